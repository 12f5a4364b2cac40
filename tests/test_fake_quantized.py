"""Quantization-aware training: rounding, straight-through gradients, refusals, and a run."""

import functools
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import sat_jax
from sat_jax.compress import merge_factors
from sat_jax.compress.fake_quantization import fake_quantized_layout
from sat_jax.compress.packed import quantized_reader
from sat_jax.compress.quantize import Quantization
from sat_jax.config_values import from_config_dict, parse
from sat_jax.interop import open_weights
from sat_jax.models.build import layout_of
from sat_jax.nn.decoder import Compute
from sat_jax.nn.fake_quantized import FakeQuantized
from sat_jax.nn.layout import flat_values
from sat_jax.nn.param import normal, param
from sat_jax.nn.quantized import Bits, Quantized
from sat_jax.nn.stack import cast
from sat_jax.train.loop import train
from sat_jax.train.metrics import read_metrics
from sat_jax.train.run_weights import open_run
from sat_jax.train.setup import _check_quantized
from tests.conftest import slow_after
from tests.executions import plain
from tests.small_models import random_params
from tests.test_config import nested
from tests.test_lora_runs import arrays
from tests.test_qlora import MODEL
from tests.test_qlora_runs import settings
from tests.test_quantize import CONFIG
from tests.tolerances import assert_close
from tests.user_errors import user_error


@functools.cache
def rounded(bits: Bits, group: int) -> dict[str, Any]:
    """Parameters by path, with matrices that are quantized after training."""
    layout, method = layout_of(CONFIG), Quantization("rtn", bits, group)
    read = quantized_reader(random_params(CONFIG).__getitem__, layout, method)
    return {path: read(path) for path in layout.leaves}


def test_rounding_by_hand() -> None:
    """Of what reads in groups of 3 of the last axis, of what writes in groups of 3 units. Halves
    become even, and the largest |w| is 7.5 scales."""
    row = [7.5, -7.5, 0.4, 0.75, -0.05, 0.25]
    expected = [7.0, -8.0, 0.0, 0.7, 0.0, 0.2]
    weights = jnp.asarray([row, row])
    reads = FakeQuantized(weights, 4, 3, 1, False)
    assert_close(reads.dense(), [expected] * 2, "float32", "product")
    # Units of two axes, flattened, in one layer and in two.
    writes = FakeQuantized(weights.T.reshape(3, 2, 2), 4, 3, 2, True)
    dense = np.array([expected] * 2).T.reshape(3, 2, 2)
    assert_close(writes.dense(), dense, "float32", "product")
    both = FakeQuantized(jnp.stack([writes.array, -writes.array]), 4, 3, 2, True)
    assert_close(both.dense()[0], dense, "float32", "product")


@pytest.mark.parametrize(("bits", "group"), [(4, 8), (8, 0)])
def test_values_are_those_of_quantization_after_training(bits: Bits, group: int) -> None:
    """Bit for bit, in the layout of the float model."""
    plain_layout = layout_of(CONFIG)
    layout = fake_quantized_layout(plain_layout, bits, group)
    assert (layout.leaves, layout.shapes) == (plain_layout.leaves, plain_layout.shapes)
    model = layout.bind(jax.tree.map(jnp.asarray, random_params(CONFIG)))
    assert flat_values(model).keys() == plain_layout.leaves.keys()
    values = flat_values(merge_factors(model))
    for path, weight in rounded(bits, group).items():
        dense = weight.dense() if isinstance(weight, Quantized) else weight
        np.testing.assert_array_equal(values[path], dense, err_msg=path)
    assert np.any(values["layers/mlp/down"] != random_params(CONFIG)["layers/mlp/down"])


@pytest.mark.parametrize("dtype", slow_after(1, "float32", "bfloat16"))
def test_gradients_are_those_of_the_rounded_weights(dtype: Any) -> None:
    compute = Compute(dtype=dtype)
    layout = layout_of(CONFIG, compute)
    weights = {
        path: np.asarray(weight.dense() if isinstance(weight, Quantized) else weight)
        for path, weight in rounded(4, 8).items()
    }
    actual = plain(fake_quantized_layout(layout, 4, 8), random_params(CONFIG))
    expected = plain(layout, weights)
    assert_close(actual.logits, expected.logits, dtype, "forward")
    assert actual.gradients.keys() == expected.gradients.keys()
    for path, gradient in expected.gradients.items():
        assert actual.gradients[path].dtype == jnp.float32
        assert_close(actual.gradients[path], gradient, dtype, "backward")


def test_weights_are_rounded_in_float32() -> None:
    """In bfloat16, 1 + 1/256 and 1 would be equal, and so would be their scales."""
    variable = param(normal(nnx.Rngs(0), 1.0), {"channel": 2, "embed": 2})
    weight = jnp.asarray([[1 + 2.0**-8, 0], [1, 0]])
    variable.set_value(FakeQuantized(weight, 8, 0, 1, False))
    dense = np.asarray(cast({"up": variable}, "bfloat16")["up"].get_value().dense())
    assert_close(dense[0, 0] / dense[1, 0], 1 + 2.0**-8, "float32", "product")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quantization.group": 32}, "quantization.group 32 needs quantization.bits"),
        (
            {"quantization.bits": 4, "quantization.group": 48},
            "quantization.group 48: group 48: layers/attention/key has 64 columns; accepted:"
            " divisors, such as 32, or 0 for one scale of each row",
        ),
        (
            {"quantization.bits": 4, "lora.rank": 2},
            "quantization.bits 4 excludes lora.rank 2: matrices with adapters are frozen, and"
            " lora.base quantizes them; accepted: one of the two",
        ),
        (
            {"quantization.bits": 8, "sparsity.token_rate": 0.5},
            "quantization.bits 8 excludes rates of sparsity above 0, and sparsity.weights.density"
            " below 1 (0.5 is omitted): groups of weights have scales of all their weights;"
            " accepted: one of the two",
        ),
        ({"quantization.bits": 3}, "quantization.bits is 3; accepted: one of 4, 8, or None"),
    ],
)
def test_settings_that_are_refused(changes: dict[str, Any], message: str) -> None:
    def check() -> None:
        _check_quantized(from_config_dict(nested(changes)), MODEL, None)

    assert user_error(check) == message


def test_bits_on_the_command_line() -> None:
    assert parse("quantization.bits", "4") == 4
    assert user_error(lambda: parse("quantization.bits", "5")) == (
        "quantization.bits is '5'; accepted: one of 4, 8, or None"
    )


@pytest.mark.slow
def test_a_run_exports_the_model_that_it_evaluates(tmp_path: Path) -> None:
    """In packed form, and dequantized for transformers; a killed run continues bit by bit."""
    path, changes = tmp_path / "run", {"quantization__bits": 4, "quantization__group": 16}
    config = settings(**changes, lora__rank=0, lora__targets="")
    train(config, path, lambda _: None)
    records = read_metrics(path / "metrics.jsonl")
    assert all(np.isfinite(r["loss"]) for r in records if "loss" in r)
    model, packed, dense = (
        sat_jax.load_model(p) for p in (path, path / "quantized", path / "huggingface")
    )
    assert isinstance(jax.tree.leaves(flat_values(packed)["layers/mlp/up/values"])[0], jax.Array)
    tokens = jnp.arange(16)[None]
    for other in (packed, dense):
        assert_close(other(tokens), model(tokens), "float32", "forward")
    opened = [open_run(path)[0], open_weights(path / "quantized")]
    opened.append(open_weights(path / "huggingface"))
    master = arrays(path)
    for name in opened[0].paths:
        values = [weights.read(name) for weights in opened]
        for value in values[1:]:
            np.testing.assert_array_equal(values[0], value, err_msg=name)
        is_matrix = name.startswith("layers/") and "norm" not in name
        assert np.any(values[0] != master[f"params/{name}"]) == is_matrix, name
    again = tmp_path / "again"
    shutil.copytree(path, again)
    (again / "summary.json").unlink()
    shutil.rmtree(again / "checkpoints" / "4")
    train(config, again, lambda _: None)
    for name, value in arrays(again).items():
        np.testing.assert_array_equal(value, master[name], err_msg=name, strict=True)
