"""Low-rank adapters as a type of weight: against the explicit formulas, in every family."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sat_jax.compress import merge_factors, with_new_adapters, without_adapters
from sat_jax.compress.lora import add_lora, lora_layout, target_paths
from sat_jax.models.build import layout_of
from sat_jax.models.decoder_config import DecoderConfig
from sat_jax.models.gpt2 import GPT2Config
from sat_jax.models.gpt_neox import GPTNeoXConfig
from sat_jax.models.retnet import RetNetConfig
from sat_jax.nn.decoder import Compute
from sat_jax.nn.layout import Layout, flat_values
from sat_jax.nn.lora import Lora, LoraSettings
from sat_jax.nn.low_rank import LowRank
from sat_jax.parallel.rules import parameter_spec
from sat_jax.sparsity.execution.base import Execution
from sat_jax.sparsity.execution.gather import Gather
from sat_jax.sparsity.execution.mask import Mask
from sat_jax.sparsity.flops import training_flops
from sat_jax.sparsity.plan import make_plan
from tests.conftest import slow_after
from tests.executions import assert_gradients_close, kept_rows, plain, run
from tests.small_models import CONFIGS, neurons, random_kept, random_params
from tests.tolerances import Direction, assert_close
from tests.user_errors import user_error

SIZES: dict[str, Any] = {
    "vocab_size": 32, "d_model": 16, "n_layers": 2, "n_heads": 4, "d_ff": 24, "max_positions": 32,
}  # fmt: skip
FAMILIES: dict[str, DecoderConfig] = {
    "gqa": dataclasses.replace(CONFIGS["gqa"], n_layers=2),
    "gpt2": GPT2Config(**SIZES),
    "gpt_neox": GPTNeoXConfig(**SIZES),
    "retnet": RetNetConfig(**SIZES, d_value=32, norm_eps=0.1, chunk=4),
}
SETTINGS = LoraSettings(rank=3, alpha=6.0)


@functools.cache
def adapted(
    config: DecoderConfig, settings: LoraSettings
) -> tuple[Layout[Any], dict[str, np.ndarray]]:
    """A model with adapters that change its function: layout and arrays by path."""
    plain_layout, rng = layout_of(config), np.random.default_rng(7)
    values = jax.jit(lambda p: add_lora(plain_layout, p, settings, 0))(random_params(config))
    arrays = {path: np.asarray(value) for path, value in values.items()}
    for path, value in arrays.items():
        if "/update/" in path:
            arrays[path] = 0.3 * rng.normal(size=value.shape).astype(np.float32)
        elif path.endswith("/magnitude"):
            arrays[path] = (value * rng.uniform(0.5, 1.5, value.shape)).astype(np.float32)
    return lora_layout(plain_layout, settings), arrays


def matrix(array: np.ndarray, writes: bool) -> np.ndarray:
    """An array of all layers as matrices `[L, out, in]`, float64."""
    rows = array.reshape(len(array), -1, array.shape[-1]).astype(np.float64)
    return rows.swapaxes(1, 2) if writes else rows


@dataclasses.dataclass
class Formula:
    """W + s · B · A of one parameter, as matrices of all layers in float64; with a magnitude, of
    rows that are scaled to these norms."""

    w: np.ndarray
    b: np.ndarray
    a: np.ndarray
    scale: float
    magnitude: np.ndarray | None

    @classmethod
    def of(cls, arrays: dict[str, Any], path: str, writes: bool, scale: float) -> "Formula":
        left, right = (arrays[f"{path}/update/{name}"] for name in ("left", "right"))
        rank = left.shape[-1]
        flat = left.reshape(len(left), -1, rank).astype(np.float64)
        pair = (right.astype(np.float64).swapaxes(1, 2), flat.swapaxes(1, 2))
        b, a = pair if writes else (flat, right.astype(np.float64))
        magnitude = arrays.get(f"{path}/magnitude")
        if magnitude is not None:
            magnitude = magnitude.reshape(len(left), -1, 1).astype(np.float64)
        return cls(matrix(arrays[f"{path}/base"], writes), b, a, scale, magnitude)

    @property
    def gain(self) -> Any:
        if self.magnitude is None:
            return 1.0
        return self.magnitude / np.linalg.norm(self.total, axis=-1, keepdims=True)

    @property
    def total(self) -> np.ndarray:
        return self.w + self.scale * self.b @ self.a

    def gradients(self, of_weight: np.ndarray) -> dict[str, np.ndarray]:
        """Of A, B and the magnitude, from that of the merged weight; the norm is a constant."""
        of_total = self.gain * of_weight
        gradients = {
            "a": self.scale * self.b.swapaxes(1, 2) @ of_total,
            "b": self.scale * of_total @ self.a.swapaxes(1, 2),
        }
        if self.magnitude is not None:
            directions = self.total * self.gain / self.magnitude
            gradients["magnitude"] = (of_weight * directions).sum(-1)
        return gradients


def test_products_by_hand() -> None:
    """W = [[1, 2], [3, 4]], B = [[1], [2]], A = [[1, -1]], alpha / rank = 3."""
    base, b, a = (jnp.asarray(m, jnp.float32) for m in ([[1, 2], [3, 4]], [[1], [2]], [[1, -1]]))
    reads = Lora(base, LowRank(b, a), alpha=3.0)
    merged = np.array([[4.0, -1.0], [9.0, -2.0]])
    x = jnp.asarray([[[1.0, 10.0]]])
    assert_close(reads.dense(), merged, "float32", "forward")
    assert_close(reads.project(x), [[[-6.0, -11.0]]], "float32", "forward")
    assert_close(reads.combine(x), [[[94.0, -21.0]]], "float32", "forward")
    # rsLoRA of rank 4: alpha / √4.
    assert (
        Lora(base, LowRank(jnp.ones((2, 4)), jnp.ones((4, 2))), alpha=3.0, rslora=True).scale == 1.5
    )


def test_dora_by_hand() -> None:
    """Outputs have weights of norm `magnitude`: rows of what reads, columns of what writes."""
    base, nothing = (
        jnp.asarray([[3.0, 5.0], [4.0, 12.0]]),
        LowRank(jnp.zeros((2, 1)), jnp.zeros((1, 2))),
    )
    rows = Lora(base, nothing, jnp.asarray([np.sqrt(34), 2 * np.sqrt(160)]))
    assert_close(rows.dense(), [[3.0, 5.0], [8.0, 24.0]], "float32", "forward")
    columns = Lora(base, nothing, jnp.asarray([5.0, 26.0]), writes=True)
    assert_close(columns.dense(), [[3.0, 10.0], [4.0, 24.0]], "float32", "forward")
    x = jnp.asarray([[[1.0, 1.0]]])
    assert_close(rows.project(x), [[[8.0, 32.0]]], "float32", "forward")
    assert_close(columns.combine(x), [[[7.0, 34.0]]], "float32", "forward")


def test_axes_and_what_is_trained_are_derived() -> None:
    layout = lora_layout(layout_of(FAMILIES["gqa"]), dataclasses.replace(SETTINGS, dora=True))
    described = {
        path.removeprefix("layers/"): (leaf.axes, leaf.trained, leaf.role)
        for path, leaf in layout.leaves.items()
        if "/query" in path or "/down" in path
    }
    head = ("layer", "kv_group", "query_head", "head_dim")
    assert described == {
        "attention/query/base": ((*head, "embed"), False, "read"),
        "attention/query/update/left": ((*head, "rank"), True, "read"),
        "attention/query/update/right": (("layer", "rank", "embed"), True, "read"),
        "attention/query/magnitude": (head, True, "vector"),
        "mlp/down/base": (("layer", "channel", "embed"), False, "write"),
        "mlp/down/update/left": (("layer", "channel", "rank"), True, "write"),
        "mlp/down/update/right": (("layer", "rank", "embed"), True, "write"),
        "mlp/down/magnitude": (("layer", "embed"), True, "vector"),
    }
    specs = {
        path: parameter_spec(layout, f"layers/attention/query/{path}", ndim)
        for path, ndim in (("update/left", 5), ("update/right", 3))
    }
    assert [tuple(spec) for spec in specs.values()] == [
        ("pipeline", "tensor", None, None, None),
        ("pipeline", None, ("fsdp", "context")),
    ]


@pytest.mark.parametrize(
    ("changes", "frozen_share"),
    [
        ({}, "all but adapters"),
        ({"trained": ("norms",)}, "norms"),
        ({"trained": ("embeddings",), "targets": ("query", "mlp/down")}, "embeddings"),
    ],
)
def test_what_is_trained(changes: dict[str, Any], frozen_share: str) -> None:
    layout = lora_layout(layout_of(FAMILIES["gpt2"]), dataclasses.replace(SETTINGS, **changes))
    in_full = {p for p, leaf in layout.leaves.items() if leaf.trained and "/update/" not in p}
    block = {f"layers/{part}_norm{kind}" for part in ("attention", "mlp") for kind in ("", "_bias")}
    assert (
        in_full
        == {
            "all but adapters": set(),
            "norms": block | {"final_norm", "final_norm_bias"},
            "embeddings": {"embed", "positions"},
        }[frozen_share]
    )
    names = {p.removesuffix("/update/left") for p in layout.leaves if p.endswith("/left")}
    every = {"attention/query", "attention/key", "attention/value", "attention/output"}
    chosen = (
        {"attention/query", "mlp/down"} if "targets" in changes else {*every, "mlp/up", "mlp/down"}
    )
    assert names == {f"layers/{name}" for name in chosen}


def test_a_target_that_does_not_exist() -> None:
    assert user_error(lambda: target_paths(layout_of(FAMILIES["gpt2"]), ("up", "gate"))) == (
        "lora.targets: this model has no matrix 'gate'; accepted: key, output, query, value, down,"
        " up, also with the name of the branch, as in mlp/up"
    )


@pytest.mark.parametrize(
    ("family", "dora"),
    slow_after(
        1, ("gpt_neox", True), ("gqa", False), ("gqa", True), ("gpt2", False), ("retnet", False)
    ),
)
def test_a_model_equals_the_explicit_formula(family: str, dora: bool) -> None:
    """Logits, and gradients: those of A, B and magnitudes follow from the merged weights'."""
    settings = dataclasses.replace(SETTINGS, dora=dora, rslora=dora)
    config = FAMILIES[family]
    layout, arrays = adapted(config, settings)
    scale = 6.0 / (np.sqrt(3) if dora else 3)
    merged, formulas = {}, {}
    for path, leaf in layout_of(config).leaves.items():
        if path in layout.leaves:
            merged[path] = arrays[path]
            continue
        writes = leaf.role == "write"
        formulas[path] = formula = Formula.of(arrays, path, writes, scale)
        total = formula.total * formula.gain
        total = total.swapaxes(1, 2) if writes else total
        merged[path] = total.reshape(arrays[f"{path}/base"].shape).astype(np.float32)
    actual, expected = plain(layout, arrays), plain(layout_of(config), merged)
    assert_close(actual.logits, expected.logits, "float32", "forward")
    direction: Direction = "retention" if family == "retnet" else "backward"
    for path, formula in formulas.items():
        writes = layout.leaves[f"{path}/base"].role == "write"
        gradients = formula.gradients(matrix(np.asarray(expected.gradients[path]), writes))
        if writes:
            a, b = (gradients[kind].swapaxes(1, 2) for kind in "ba")
            gradients |= {"a": a, "b": b}
        names = {"update/left": "b", "update/right": "a", "magnitude": "magnitude"}
        for name, kind in list(names.items())[: 2 + dora]:
            gradient = np.asarray(actual.gradients[f"{path}/{name}"])
            assert_close(gradient, gradients[kind].reshape(gradient.shape), "float32", direction)


def test_a_new_adapter_changes_nothing_and_can_be_removed() -> None:
    config = FAMILIES["gqa"]
    values = random_params(config)
    model = layout_of(config).bind(jax.tree.map(jnp.asarray, values))
    tokens = jnp.arange(8)[None]
    logits = jax.jit(lambda m: m(tokens))
    for dora in (False, True):
        new = with_new_adapters(model, dataclasses.replace(SETTINGS, dora=dora))
        assert_close(logits(new), logits(model), "float32", "forward")
    arrays = flat_values(new)
    bound = 16**-0.5
    a = np.asarray(arrays["layers/mlp/up/update/right"])
    assert a.shape == (2, 3, 16) and 0.9 * bound < np.abs(a).max() <= bound
    assert not np.any(arrays["layers/mlp/up/update/left"])
    assert np.any(arrays["layers/mlp/down/update/left"])
    layout, changed = adapted(config, SETTINGS)
    trained = layout.bind(jax.tree.map(jnp.asarray, changed))
    assert_close(logits(merge_factors(trained)), logits(trained), "float32", "forward")
    for path, value in flat_values(without_adapters(trained)).items():
        np.testing.assert_array_equal(value, values[path], err_msg=path)
    assert user_error(lambda: with_new_adapters(trained, SETTINGS)).startswith(
        "the model has adapters already; accepted"
    )


@pytest.mark.parametrize("execution", [Gather, Mask])
def test_omitted_units(execution: type[Execution]) -> None:
    """Adapters of omitted units are omitted with them: as in the merged model."""
    config = CONFIGS["gqa"]
    layout, arrays = adapted(config, SETTINGS)
    plan = make_plan(neurons(config), 0.5, 0.5, dense_layers=(0,))
    kept = random_kept(config, plan)
    actual = run(execution(layout, plan), arrays, kept)
    merged = flat_values(merge_factors(layout.bind(jax.tree.map(jnp.asarray, arrays))))
    dense = run(Gather(layout_of(config), plan), jax.tree.map(np.asarray, merged), kept)
    assert_close(actual.logits, dense.logits, "float32", "forward")
    assert all("/update/" in path for path in actual.gradients)
    other = run(Gather(layout, plan), arrays, kept)
    gradients = actual.gradients
    if execution is Mask:
        omitted = Gather(layout, plan).compact(gradients, kept)[1]
        assert not any(np.any(x) for x in jax.tree.leaves(omitted))
        gradients = kept_rows(layout, plan, gradients, kept)
    assert_gradients_close(gradients, other.gradients)


def test_magnitudes_stay_float32() -> None:
    """bfloat16 rounds 1 + 1/1024 to 1."""
    settings = dataclasses.replace(SETTINGS, dora=True)
    config = FAMILIES["gqa"]
    _, arrays = adapted(config, settings)
    layout = lora_layout(layout_of(config, Compute(dtype="bfloat16")), settings)
    path = "layers/mlp/up/magnitude"
    one = np.ones_like(arrays[path])
    logits = jax.jit(lambda values: layout.bind(values)(jnp.arange(8)[None]))
    more = one + np.float32(2.0**-10)
    assert np.any(logits(arrays | {path: one}) != logits(arrays | {path: more}))


def test_flops_by_hand() -> None:
    """A frozen matrix has no product for its gradient; embedding and head are frozen, too."""
    config = FAMILIES["gqa"]
    dense, adapted_ = layout_of(config), lora_layout(layout_of(config), SETTINGS)
    matrices = 2 * (2 * 12 * 4 * 16 + 2 * 4 * 4 * 16 + 3 * 24 * 16)  # two layers
    factors = 2 * 3 * (2 * (12 * 4 + 16) + 2 * (4 * 4 + 16) + 3 * (24 + 16))
    head = 32 * 16
    before, after = training_flops(dense, 8), training_flops(adapted_, 8)
    assert after.forward - before.forward == 2 * factors
    assert after.backward - before.backward == 4 * factors - 2 * (matrices + head)
