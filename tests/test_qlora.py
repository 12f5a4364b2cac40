"""Adapters of a quantized base: layouts, loss and gradients, memory, and refusals."""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sat_jax.compress.lora import add_lora, lora_layout
from sat_jax.compress.packed import base_method, quantized_reader
from sat_jax.config_values import from_config_dict
from sat_jax.interop import Weights, quantized
from sat_jax.models.build import layout_of
from sat_jax.models.llama import LlamaConfig
from sat_jax.nn.layout import Layout
from sat_jax.nn.lora import Lora, LoraSettings
from sat_jax.nn.low_rank import LowRank
from sat_jax.nn.param import normal, param
from sat_jax.nn.quantized import Quantized
from sat_jax.nn.stack import cast
from sat_jax.parallel.mesh import make_mesh
from sat_jax.parallel.rules import parameter_spec
from sat_jax.sparsity.flops import training_flops
from sat_jax.sparsity.plan import make_plan
from sat_jax.train.programs import Programs
from sat_jax.train.setup import _check_quantized, controller_of
from sat_jax.train.step_program import count_bytes
from tests.conftest import slow_after
from tests.executions import plain
from tests.small_models import neurons, random_params
from tests.test_config import nested
from tests.test_quantize import CONFIG
from tests.tolerances import assert_close
from tests.user_errors import user_error

SETTINGS = LoraSettings(rank=3, alpha=6.0, targets=("query", "down"))


@functools.cache
def adapted(base: str, settings: LoraSettings) -> tuple[dict[str, Any], Layout[Any], Any]:
    """The quantized parameters by path; layout and arrays of a model with adapters on them."""
    layout, rng = layout_of(CONFIG), np.random.default_rng(7)
    method = base_method(base, 8)
    assert method is not None
    read = quantized_reader(random_params(CONFIG).__getitem__, layout, method)
    weights = {path: read(path) for path in layout.leaves}
    arrays = jax.tree.map(np.asarray, add_lora(layout, weights, settings, 0))
    for path, value in arrays.items():
        if path.endswith(("left", "right")):
            arrays[path] = 0.3 * rng.normal(size=value.shape).astype(np.float32)
    return weights, lora_layout(layout, settings, method.packing), arrays


def test_every_frozen_matrix_is_quantized() -> None:
    """That of targets inside of their adapters. Scales are vectors, which no product counts."""
    _, layout, arrays = adapted("nf4", SETTINGS)
    shapes = {path: (array.shape, array.dtype) for path, array in arrays.items()}
    assert shapes == {path: (s.shape, s.dtype) for path, s in layout.shapes.items()}
    described = {
        path.removeprefix("layers/"): (leaf.axes, leaf.trained, leaf.role)
        for path, leaf in layout.leaves.items()
        if path.startswith(("layers/mlp/up", "layers/mlp/down"))
    }
    units = ("layer", "channel")
    assert described == {
        "mlp/up/values": ((*units, "embed_pair"), False, "read"),
        "mlp/up/scale": ((*units, "group"), False, "vector"),
        "mlp/down/base/values": ((*units, "embed_pair"), False, "write"),
        "mlp/down/base/scale": (("layer", "group", "embed"), False, "vector"),
        "mlp/down/update/left": ((*units, "rank"), True, "write"),
        "mlp/down/update/right": (("layer", "rank", "embed"), True, "write"),
    }
    trained = {path for path, leaf in layout.leaves.items() if leaf.trained}
    assert trained == {path for path in layout.leaves if "/update/" in path}
    specs = [
        tuple(parameter_spec(layout, f"layers/mlp/{name}", 3))
        for name in ("up/values", "up/scale", "down/base/scale")
    ]
    embed, stages = ("fsdp", "context"), ("pipeline",)
    assert [
        tuple(axis if isinstance(axis, tuple) or axis is None else (axis,) for axis in spec)
        for spec in specs
    ] == [(stages, ("tensor",), embed), (stages, ("tensor",), None), (stages, None, embed)]


@pytest.mark.parametrize(
    ("base", "dora"), slow_after(1, ("nf4", False), ("int4", True), ("int8", False))
)
def test_loss_and_gradients_are_those_of_the_dequantized_base(base: str, dora: bool) -> None:
    settings = dataclasses.replace(SETTINGS, dora=dora)
    weights, layout, arrays = adapted(base, settings)
    dense = {
        f"{path}{'/base' if f'{path}/base/values' in arrays else ''}": np.asarray(weight.dense())
        for path, weight in weights.items()
        if isinstance(weight, Quantized)
    }
    rest = {p: a for p, a in arrays.items() if not p.endswith(("/values", "/scale"))}
    expected_layout = lora_layout(layout_of(CONFIG), settings)
    assert expected_layout.leaves.keys() == (dense | rest).keys()

    def result(layout: Layout[Any], arrays: dict[str, Any]) -> Any:
        frozen = {p: a for p, a in arrays.items() if not layout.leaves[p].trained}
        bound = Bound(layout, frozen)
        return plain(bound, {p: a for p, a in arrays.items() if p not in frozen})

    actual, expected = result(layout, arrays), result(expected_layout, dense | rest)
    assert_close(actual.logits, expected.logits, "float32", "forward")
    assert actual.gradients.keys() == expected.gradients.keys()
    assert "layers/attention/query/update/left" in actual.gradients
    for path, gradient in expected.gradients.items():
        assert np.any(gradient), path
        assert_close(actual.gradients[path], gradient, "float32", "backward")


@dataclasses.dataclass
class Bound:
    """A layout with its frozen arrays."""

    layout: Layout[Any]
    frozen: dict[str, Any]

    def bind(self, trained: Any) -> Any:
        return self.layout.bind({**self.frozen, **trained})


def test_scales_of_a_base_stay_float32() -> None:
    """Also inside of an adapter, whose factors are cast."""
    scale = jnp.full((2, 1), 1 + 2.0**-10)
    base = Quantized(jnp.ones((2, 4), jnp.int8), scale)
    lora = Lora(base, LowRank(jnp.ones((2, 1)), jnp.ones((1, 4))), jnp.ones(2))
    variable = param(normal(nnx.Rngs(0), 1.0), {"channel": 2, "embed": 4})
    variable.set_value(lora)
    weight = cast({"up": variable}, "bfloat16")["up"].get_value()
    assert weight.base.scale.dtype == weight.magnitude.dtype == jnp.float32
    assert weight.update.left.dtype == jnp.bfloat16
    assert weight.base.dense()[0, 0] == 1 + 2.0**-10


MODEL = LlamaConfig(
    vocab_size=40, d_model=64, n_layers=6, n_heads=4, n_kv_heads=2, head_dim=16, d_ff=128,
    max_positions=64,
)  # fmt: skip


def programs(**changes: Any) -> Programs:
    values = {"data.row_length": 6, "train.rows_per_step": 1, "lora.rank": 2} | changes
    config = from_config_dict(nested({key.replace("__", "."): v for key, v in values.items()}))
    return Programs(config, MODEL, make_mesh(config.mesh), controller_of(config, MODEL))


def test_the_state_has_packed_matrices() -> None:
    """By hand: half a byte for each weight, and a float32 scale for 64 or 32 of them."""
    sizes = []
    for changes in ({}, {"lora__base": "nf4"}, {"lora__base": "int8", "lora__group": 32}):
        used = programs(**changes)
        sizes.append(count_bytes(used.form(()).state))
        used.close()
    matrices = 6 * 64 * (64 + 64 + 2 * 32 + 3 * 128)
    assert sizes[0] - sizes[1] == 4 * matrices - matrices // 2 - 4 * matrices // 64
    assert sizes[0] - sizes[2] == 4 * matrices - matrices - 4 * matrices // 32


def test_one_dequantized_matrix_is_in_memory_at_a_time() -> None:
    """All matrices are as large as 6 layers, of which none may be kept for the backward pass."""
    temporary = []
    for base in (None, "nf4"):
        used = programs(lora__base=base)
        compiled = used.lower_step(make_plan(neurons(MODEL), 0.0, 0.0)).compile()
        temporary.append(compiled.memory_analysis().temp_size_in_bytes)
        used.close()
    layer = 4 * 64 * (64 + 64 + 2 * 32 + 3 * 128)
    assert temporary[1] - temporary[0] < 2 * layer


def test_flops_are_those_of_a_float_base() -> None:
    counts = [
        training_flops(lora_layout(layout_of(CONFIG), SETTINGS, packing), 8)
        for packing in (None, *(base_method(base, 8).packing for base in ("nf4", "int8")))  # type: ignore[union-attr]
    ]
    assert counts[0] == counts[1] == counts[2]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora.base": "nf4", "lora.rank": 0}, "lora.base 'nf4' needs lora.rank 1 or more, not 0"),
        ({"lora.group": 32}, "lora.group 32 needs lora.base"),
        (
            {"lora.base": "nf3"},
            "lora.base is 'nf3'; near: nf4; accepted: one of nf4, int4, int8, or None",
        ),
        (
            {"lora.base": "int4", "lora.group": 48},
            "lora.group 48: group 48: layers/attention/key has 64 columns;"
            " accepted: divisors, such as 32, or 0 for one scale of each row",
        ),
        (
            {"lora.base": "nf4", "sparsity.rate": 0.5},
            "sparsity.rate 0.5 excludes a base that is quantized (nf4): weights of several units"
            " share a scale; accepted: 0",
        ),
    ],
)
def test_settings_that_are_refused(changes: dict[str, Any], message: str) -> None:
    def check() -> None:
        _check_quantized(from_config_dict(nested({"lora.rank": 2} | changes)), MODEL, None)

    assert user_error(check) == message


def test_a_quantized_model_has_one_base() -> None:
    config = from_config_dict(nested({"lora.rank": 2, "lora.base": "nf4", "model.path": "model"}))
    packing = base_method("int8", 64).packing  # type: ignore[union-attr]
    assert user_error(lambda: _check_quantized(config, MODEL, packing)) == (
        "lora.base nf4: model.path model is quantized already (int8); accepted: None"
    )
    assert quantized.packing_from_json(quantized.packing_to_json(packing), "")[1] == packing


def test_matrices_of_several_packings_are_no_base() -> None:
    weights = Weights(MODEL, np.zeros, {}, ("int4", "int8"), stored=np.zeros)
    assert user_error(lambda: weights.check_packing("model.path x")) == (
        "model.path x: matrices are in int4 and int8; accepted: one of them, as scripts.compress"
        " writes with --bits"
    )
    packing = base_method("int8", 64).packing  # type: ignore[union-attr]
    dataclasses.replace(weights, packing=packing).check_packing("model.path x")


def test_adapters_of_a_quantized_model_are_not_merged_before_training(tmp_path: Path) -> None:
    from sat_jax.train.run_weights import starting_point

    weights, _, _ = adapted("nf4", SETTINGS)
    model = layout_of(CONFIG).bind(jax.tree.map(jnp.asarray, weights))
    method = base_method("nf4", 8)
    assert method is not None
    quantized.write_directory(
        *(tmp_path / "model", CONFIG, model, method.file_settings),
        dtype="float32",
        files={},
        generation={},
    )
    changes = {"lora.rank": 2, "model.path": str(tmp_path / "model"), "model.adapter": "x"}
    config = from_config_dict(nested(changes))
    assert "with model.adapter: weights that are quantized already (nf4); accepted" in user_error(
        lambda: starting_point(config)
    )
    del changes["model.adapter"]
    _, opened = starting_point(from_config_dict(nested(changes)))
    assert opened is not None and opened.packing == method.packing
    for path, weight in weights.items():
        for a, b in zip(*map(jax.tree.leaves, (opened.stored(path), weight)), strict=True):  # type: ignore[misc]
            np.testing.assert_array_equal(a, b, strict=True)
