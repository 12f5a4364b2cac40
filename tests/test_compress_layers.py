"""Compression layer by layer: every family, against the inputs that its matrices really get."""

import dataclasses
import functools
from collections import defaultdict

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sat_jax.compress import Factorization, InputStatistics, Pruning, prune_matrix
from sat_jax.compress.layers import compress_layers, matrices
from sat_jax.compress.method import MatrixMethod
from sat_jax.errors import UserError
from sat_jax.models.build import layout_of
from sat_jax.models.decoder_config import DecoderConfig
from sat_jax.models.gpt2 import GPT2Config
from sat_jax.models.gpt_neox import GPTNeoXConfig
from sat_jax.models.retnet import RetNetConfig
from sat_jax.nn.linear import Weight
from tests.small_models import CONFIGS, batch, random_params
from tests.tolerances import assert_close

_SIZES = {"vocab_size": 32, "d_model": 16, "n_layers": 2, "n_heads": 4, "d_ff": 24}
FAMILIES: dict[str, DecoderConfig] = {
    "llama": dataclasses.replace(CONFIGS["gqa"], n_layers=2),
    "gpt2": GPT2Config(**_SIZES, max_positions=32),
    "gpt_neox": GPTNeoXConfig(**_SIZES, max_positions=32),
    "retnet": RetNetConfig(**_SIZES, d_value=32, max_positions=32, chunk=8),
}
LLAMA = FAMILIES["llama"]
Inputs = dict[str, list[np.ndarray]]
SEEN: Inputs = defaultdict(list)


@functools.partial(jax.tree_util.register_dataclass, data_fields=("values",), meta_fields=("path",))
@dataclasses.dataclass(frozen=True)
class Recorded(Weight):
    """An array that records the inputs of its products."""

    values: jax.Array
    path: str

    def dense(self) -> jax.Array:
        return self.values

    def project(self, x: jax.Array) -> jax.Array:
        return super().project(self._record(x))

    def combine(self, a: jax.Array) -> jax.Array:
        return super().combine(self._record(a))

    def _record(self, x: jax.Array) -> jax.Array:
        jax.debug.callback(lambda x: SEEN[self.path].append(np.asarray(x)), x, ordered=True)
        return x


def recorded_inputs(config: DecoderConfig, values: dict[str, np.ndarray]) -> Inputs:
    """Return the inputs of each matrix by layer, `[tokens, in]` without padding."""
    layout, rows = layout_of(config), batch(config)
    paths = {matrix.path for matrix in matrices(layout)}
    weights = {p: Recorded(jnp.asarray(v), p) if p in paths else v for p, v in values.items()}
    SEEN.clear()
    jax.block_until_ready(layout.bind(weights)(rows.tokens, rows.segment_ids, rows.positions))
    jax.effects_barrier()
    mask = np.asarray(rows.segment_ids) > 0
    return {
        path: [x.reshape(*x.shape[:2], -1)[mask] for x in layers] for path, layers in SEEN.items()
    }


def copied(config: DecoderConfig) -> dict[str, np.ndarray]:
    return {path: np.array(value) for path, value in random_params(config).items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_statistics_are_of_the_inputs_after_compressed_layers(family: str) -> None:
    config = FAMILIES[family]
    layout, original, values = layout_of(config), random_params(config), copied(config)
    _, result = compress_layers(layout, values, [batch(config)], Pruning("wanda"))
    parts = matrices(layout)
    changed = {path for path, value in values.items() if (value != original[path]).any()}
    assert changed == {matrix.path for matrix in parts}
    # The second layer is not compressed yet when its statistics are taken.
    mixed = values | {path: np.stack([values[path][0], original[path][1]]) for path in changed}
    inputs = recorded_inputs(config, mixed)
    for matrix in parts:
        weight = matrix.flatten(jnp.asarray(original[matrix.path][1]))
        pruned, removed = prune_matrix(weight, inputs[matrix.path][1], "wanda")
        assert_close(values[matrix.path][1], matrix.unflatten(pruned), "float32", "exact")
        assert result.removed[matrix.path] == int(removed.sum())


@pytest.mark.parametrize(
    "method",
    [
        Pruning("sparsegpt", pattern="2:4", block=8),
        Factorization("asvd", 0.5),
        Factorization("svd-llm", 0.5),
    ],
    ids=lambda method: method.method,
)
def test_statistics_are_added_over_batches(method: MatrixMethod) -> None:
    """Padding does not count, and two batches have the statistics of one."""
    config = dataclasses.replace(CONFIGS["mha"], n_layers=1, d_ff=16)  # matrices of one size
    rows, original, values = batch(config), random_params(config), copied(config)
    batches = [type(rows)(*(array[part] for array in rows)) for part in (slice(1), slice(1, 2))]
    layout = layout_of(config)
    next(compress_layers(layout, values, batches, method))
    inputs = recorded_inputs(config, original)
    for matrix in matrices(layout):
        weight = matrix.flatten(jnp.asarray(original[matrix.path][0]))
        statistics = InputStatistics.of_inputs(inputs[matrix.path][0], method.needs)
        expected = matrix.unflatten(method(weight, statistics).weight)
        assert_close(values[matrix.path][0], expected, "float32", "forward")


def test_error_of_a_layer() -> None:
    rows, original, values = batch(LLAMA), random_params(LLAMA), copied(LLAMA)
    layout = layout_of(LLAMA)
    result = next(compress_layers(layout, values, [rows], Pruning("magnitude")))

    def output(params: dict[str, np.ndarray]) -> np.ndarray:
        first_layer = {p: v[:1] if p.startswith("layers/") else v for p, v in params.items()}
        y, _ = layout.bind(first_layer).apply_layers(stream, rows.segment_ids, rows.positions)
        return np.asarray(y)[np.asarray(rows.segment_ids) > 0]

    stream = jnp.take(jnp.asarray(original["embed"]), rows.tokens, axis=0)
    before = np.asarray(stream)[np.asarray(rows.segment_ids) > 0]
    change = np.linalg.norm(output(values) - output(original))
    expected = change / np.linalg.norm(output(original) - before)
    assert_close(result.error, expected, "float32", "forward")


def test_activations_that_are_not_finite() -> None:
    values = copied(LLAMA)
    values["layers/attention_norm"][0] = np.inf
    with pytest.raises(UserError, match="layer 0: the inputs of layers/attention/key are not"):
        next(compress_layers(layout_of(LLAMA), values, [batch(LLAMA)], Pruning("wanda")))


def test_weights_that_are_not_finite() -> None:
    values = copied(LLAMA)
    values["layers/mlp/up"][0, 0, 0] = np.nan
    with pytest.raises(UserError, match="layer 0: layers/mlp/up has weights that are not finite"):
        next(compress_layers(layout_of(LLAMA), values, [batch(LLAMA)], Factorization("svd")))


def test_a_matrix_that_the_pattern_does_not_divide() -> None:
    values = copied(LLAMA)
    method = Pruning("magnitude", pattern="5:10", block=10)
    with pytest.raises(UserError, match="5:10: layers/attention/key has 16 columns; accepted"):
        next(compress_layers(layout_of(LLAMA), values, [batch(LLAMA)], method))
    assert all((value == random_params(LLAMA)[path]).all() for path, value in values.items())
