"""Block-sparse weights: products, layouts, whole models and their training state."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.block_sparse_matmul import BlockMask
from sat_jax.config import OptimizerConfig
from sat_jax.models.build import layout_of
from sat_jax.models.decoder_config import DecoderConfig
from sat_jax.models.gpt2 import GPT2Config
from sat_jax.models.gpt_neox import GPTNeoXConfig
from sat_jax.models.llama import LlamaConfig
from sat_jax.nn.block_sparse import BlockSparse
from sat_jax.nn.decoder import Compute
from sat_jax.nn.layout import flat_values, make_layout
from sat_jax.nn.linear import PRODUCT
from sat_jax.sparsity.block_patterns import block_magnitudes, static_blocks
from sat_jax.sparsity.execution.blocks import Blocks
from sat_jax.sparsity.execution.state import TrainState, map_trees, new_state, optimizer_step
from sat_jax.sparsity.flops import forward_flops
from sat_jax.sparsity.plan import make_plan
from sat_jax.sparsity.rows import Kept
from sat_jax.train.optimizer import make_optimizer
from tests.executions import ROWS, Result, assert_gradients_close, differentiate, equal, plain, run
from tests.small_models import compact_state, expand_state, neurons, random_params
from tests.tolerances import assert_close
from tests.user_errors import user_error

BLOCK = 8
SIZES: dict[str, Any] = {
    "vocab_size": 32,
    "d_model": 32,
    "n_layers": 2,
    "n_heads": 4,
    "d_ff": 64,
    "max_positions": 32,
}
MODELS: dict[str, DecoderConfig] = {
    "gpt2": GPT2Config(**SIZES),  # gelu_new
    "gpt_neox": GPTNeoXConfig(**SIZES),  # gelu
    "llama": LlamaConfig(**SIZES, n_kv_heads=2, head_dim=8),
}
MLP = {"gpt2": ("up", "down"), "gpt_neox": ("up", "down"), "llama": ("gate", "up", "down")}


def paths(family: str) -> list[str]:
    attention = [f"layers/attention/{name}" for name in ("query", "key", "value", "output")]
    return attention + [f"layers/mlp/{name}" for name in MLP[family]]


@functools.cache
def sparse_params(family: str) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Return full parameters with zeros in half of the blocks, and the kept blocks by path."""
    params = dict(random_params(MODELS[family]))
    magnitudes = {p: block_magnitudes(p, params[p], BLOCK) for p in paths(family)}
    kept = static_blocks("random", magnitudes, 0.5, seed=1)
    for path, blocks in kept.items():
        entries = blocks.repeat(BLOCK, axis=1).repeat(BLOCK, axis=2)
        params[path] = params[path] * entries.reshape(params[path].shape)
    return params, kept


def block_sparse(family: str) -> dict[str, Any]:
    """Return `sparse_params` with block-sparse weights."""
    params, kept = sparse_params(family)
    return params | {p: BlockSparse.of(params[p], BlockMask.of(kept[p], BLOCK)) for p in kept}


# --- Weights ---

KEPT = np.array([[1, 0], [0, 1], [1, 1]], bool)
ARRAY = np.random.default_rng(0).normal(size=(3, 8, 16)).astype(np.float32)  # units 3 and 8


def test_blocks_of_an_array_and_the_array_again() -> None:
    weight = BlockSparse.of(jnp.asarray(ARRAY), BlockMask.of(KEPT, BLOCK))
    assert weight.shape == (3, 8, 16)
    expected = np.stack([ARRAY[0, :, :8], ARRAY[1, :, 8:], ARRAY[2, :, :8], ARRAY[2, :, 8:]])
    np.testing.assert_array_equal(weight.blocks, expected)
    zeroed = ARRAY.copy()
    zeroed[0, :, 8:] = zeroed[1, :, :8] = 0
    np.testing.assert_array_equal(weight.dense(), zeroed)


def test_products_and_gradients_are_those_of_the_dense_array() -> None:
    rng = np.random.default_rng(1)
    x, a = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((2, 5, 16), (2, 5, 3, 8)))
    weight = BlockSparse.of(jnp.asarray(ARRAY), BlockMask.of(KEPT, BLOCK))
    dense = weight.dense()
    assert_close(weight.project(x), jnp.einsum("BTD,ngD->BTng", x, dense), "float32", "product")
    assert_close(weight.combine(a), jnp.einsum("BTng,ngD->BTD", a, dense), "float32", "product")

    def scalar(blocks: jax.Array) -> jax.Array:
        own = BlockSparse(blocks, weight.mask, weight.units)
        return jnp.sum(own.project(x) * a) + jnp.sum(own.combine(a) * jnp.sin(x))

    expected = jnp.einsum("BTD,BTng->ngD", x + jnp.sin(x), a)
    assert_close(
        jax.grad(scalar)(weight.blocks),
        BlockSparse.of(expected, weight.mask).blocks,
        "float32",
        "product",
    )


@pytest.mark.parametrize(("block", "implementation"), [(8, None), (128, "pallas_tpu")])
def test_layers_may_have_different_numbers_of_empty_rows_and_columns(
    block: int, implementation: Any
) -> None:
    columns = [
        [[0], [1], [2], [3], [0], [1]],
        [[0], [1], [2], [0], [0], [1]],  # column 3 is empty, column 0 has three blocks
        [[0, 1], [1], [2], [3], [0], []],  # row 5 is empty, row 0 has two blocks
    ]
    kept = np.array([[np.isin(range(4), row) for row in layer] for layer in columns])
    rng = np.random.default_rng(2)
    arrays, x, a = (
        jnp.asarray(rng.normal(size=shape), jnp.float32)
        for shape in ((3, 6 * block, 4 * block), (1, 8, 4 * block), (1, 8, 6 * block))
    )
    weight = BlockSparse.of(arrays, BlockMask.of(kept, block), implementation)

    def layer(_: None, one: BlockSparse) -> tuple[None, Any]:
        return None, (one.project(x), one.combine(a), one.dense())

    _, (read, written, dense) = jax.lax.scan(layer, None, weight)
    entries = kept.repeat(block, axis=1).repeat(block, axis=2)
    np.testing.assert_array_equal(dense, arrays * entries)
    np.testing.assert_array_equal(weight.dense(), dense)
    for n in range(3):
        assert_close(read[n], x @ dense[n].T, "float32", "product")
        assert_close(written[n], a @ dense[n], "float32", "product")


def test_layers_keep_equally_many_blocks() -> None:
    with pytest.raises(ValueError, match=r"layers keep \[4, 6\] blocks, expected one number"):
        BlockMask.of(np.stack([KEPT, np.ones((3, 2), bool)]), BLOCK)


def test_a_block_that_does_not_divide_a_matrix_is_refused() -> None:
    array = np.zeros((2, 4, 12, 32), np.float32)
    assert user_error(lambda: block_magnitudes("layers/mlp/up", array, 32)) == (
        "block 32 of layers/mlp/up [48, 32]; accepted: 8, 16"
    )


# --- Models ---


@functools.cache
def dense_result(family: str) -> Result:
    """Return the result of the dense model, without the gradient of GPT-2's biases of keys, which
    is 0 in exact arithmetic."""
    result = plain(layout_of(MODELS[family]), sparse_params(family)[0])
    if family == "gpt2":
        result.gradients.pop("layers/attention/key_bias")
    return result


@pytest.mark.parametrize("family", MODELS)
def test_logits_and_gradients_are_those_of_the_dense_model(family: str) -> None:
    kept = sparse_params(family)[1]
    model = layout_of(MODELS[family]).bind(block_sparse(family))
    layout, flat = make_layout(model), flat_values(model)
    frozen = {p: x for p, x in flat.items() if not layout.leaves[p].trained}
    trained = {p: x for p, x in flat.items() if p not in frozen}
    assert {p for p in flat if p.startswith("layers/mlp/up/")} >= {
        "layers/mlp/up/blocks",
        "layers/mlp/up/mask/rows",
    }
    assert not [p for p in trained if "/mask/" in p]
    result = jax.jit(lambda t: differentiate(lambda t: layout.bind(frozen | t), t))(trained)
    assert_close(result.logits, dense_result(family).logits, "float32", "forward")
    for path, gradient in dense_result(family).gradients.items():
        if path in kept:
            expected = BlockSparse.of(gradient, BlockMask.of(kept[path], BLOCK)).blocks
            assert_close(result.gradients[f"{path}/blocks"], expected, "float32", "backward")
        else:
            assert_close(result.gradients[path], gradient, "float32", "backward")


def test_the_layout_of_a_model_with_blocks() -> None:
    dense = layout_of(MODELS["llama"])
    model = dense.bind(block_sparse("llama"))
    layout = make_layout(model)
    assert layout.units == dense.units, "sizes are those of the full arrays"
    leaf = layout.leaves["layers/mlp/up/blocks"]
    assert leaf == (("layer", "block", "block_row", "block_column"), "read", True)
    assert layout.shapes["layers/mlp/up/blocks"].shape == (2, 16, 8, 8)
    assert layout.count_axes("layers/mlp/up/blocks") == 2
    assert layout.leaves["layers/mlp/down/mask/columns"] == (("layer", "index"), "index", False)
    optimizer = make_optimizer(OptimizerConfig(), 9, layout)
    adam = jax.eval_shape(lambda: optimizer.init(flat_values(model))[0])
    for tree in (adam.counts, adam.mu, adam.nu):
        assert {path for path in tree if path.startswith("layers/mlp/up")} == {
            "layers/mlp/up/blocks"
        }
    assert adam.counts["layers/mlp/up/blocks"].shape == (2, 16)
    half, full = (forward_flops(x, 16) for x in (layout, dense))
    assert (half.read, half.write, half.mixing) == (full.read / 2, full.write / 2, full.mixing)


def test_blocks_are_cast_and_products_saved_as_those_of_other_weights() -> None:
    layout, values = layout_of(MODELS["gpt2"], Compute("bfloat16")), block_sparse("gpt2")

    def logits(values: Any) -> jax.Array:
        return layout.bind(values)(ROWS.tokens, ROWS.segment_ids, ROWS.positions)

    program = str(jax.make_jaxpr(logits)(values))
    assert "bf16[2,16,8,8]" not in program, "cast inside the layers, not before them"
    assert "bf16[16,8,8]" in program
    assert program.count(f"name={PRODUCT}") == 3  # query, key, value; the MLP is one operation
    actual = jax.jit(logits)(values)
    assert_close(actual, dense_result("gpt2").logits, "bfloat16", "forward")


# --- Training state ---


def execution(family: str) -> tuple[Blocks, Kept]:
    config = MODELS[family]
    kept = {p: BlockMask.of(blocks, BLOCK) for p, blocks in sparse_params(family)[1].items()}
    return Blocks(layout_of(config), make_plan(neurons(config), 0.0, 0.0)), (kept,)


@pytest.mark.parametrize("family", ["gpt2", pytest.param("llama", marks=pytest.mark.slow)])
def test_execution_with_blocks_is_the_dense_model(family: str) -> None:
    blocks, kept = execution(family)
    result = run(blocks, sparse_params(family)[0], kept)
    assert_close(result.logits, dense_result(family).logits, "float32", "forward")
    expected, omitted = blocks.compact(dense_result(family).gradients, kept)
    assert not omitted
    assert_gradients_close({path: result.gradients[path] for path in expected}, expected)


def full_state(family: str) -> TrainState:
    """Return a state whose moments and counts all differ from zero."""
    layout = layout_of(MODELS[family])
    state = new_state(
        jax.tree.map(jnp.asarray, random_params(MODELS[family])),
        make_optimizer(OptimizerConfig(), 9, layout),
    )
    return jax.tree.map(lambda x: x + 3, state)


def by_path(state: TrainState) -> dict[str, tuple[Any, ...]]:
    """Return by path the parameter, both moments and the update counts."""
    adam = state.optimizer[0]
    return {p: (x, adam.mu[p], adam.nu[p], adam.counts[p]) for p, x in state.params.items()}


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_state_of_blocks_round_trip(family: str) -> None:
    blocks, kept = execution(family)
    full = full_state(family)
    compact, omitted = compact_state(blocks, full, kept)
    expanded = expand_state(blocks, compact, omitted, kept)
    equal(compact_state(blocks, expanded, kept)[0], compact)
    for path, before in by_path(full).items():
        after = by_path(expanded)[path]
        if path not in kept[0]:
            equal(after, before)
            continue
        mask = sparse_params(family)[1][path].repeat(BLOCK, axis=1).repeat(BLOCK, axis=2)
        mask = mask.reshape(after[0].shape)
        for value, expected in zip(after, (before[0], 3.0, 3.0, 3), strict=True):
            np.testing.assert_array_equal(value, np.where(mask, expected, 0))


def test_exchanged_blocks_start_at_zero() -> None:
    blocks, kept = execution("llama")
    state, omitted = compact_state(blocks, full_state("llama"), kept)
    others = sparse_params("llama")[1] | {
        "layers/mlp/up": np.roll(sparse_params("llama")[1]["layers/mlp/up"], 1, axis=2)
    }
    new = ({path: BlockMask.of(others[path], BLOCK) for path in others},)
    exchanged = map_trees(lambda tree: blocks.exchange(tree, kept, new), state)
    by_full = compact_state(blocks, expand_state(blocks, state, omitted, kept), new)[0]
    equal(exchanged, by_full)
    was_kept = sparse_params("llama")[1]["layers/mlp/up"][others["layers/mlp/up"]].reshape(2, -1)
    assert 0 < was_kept.sum() < was_kept.size
    counts = exchanged.optimizer[0].counts["layers/mlp/up"][0]
    np.testing.assert_array_equal(counts, np.where(was_kept, 3, 0))


def test_only_stored_blocks_have_state_and_the_rest_starts_at_zero() -> None:
    blocks, kept = execution("gpt2")
    layout, params = blocks.layout, sparse_params("gpt2")[0]
    optimizer = make_optimizer(OptimizerConfig(), 9, layout)
    full = new_state(jax.tree.map(jnp.asarray, params), optimizer)
    state, omitted = compact_state(blocks, full, kept)
    adam = state.optimizer[0]
    for path in kept[0]:
        half = 4 * params[path].size // 2
        for tree in (state.params, adam.mu, adam.nu):
            assert sum(x.nbytes for x in tree[path]) == half
        assert adam.counts[path][0].shape == (2, half // (4 * 2 * BLOCK**2))

    @jax.jit
    def step(gradients: Any, state: TrainState) -> TrainState:
        return optimizer_step(optimizer, gradients, jnp.float32(1), state)

    expanded = expand_state(blocks, step(run(blocks, params, kept).gradients, state), omitted, kept)
    dense = plain(layout, expanded.params)
    assert_close(dense.logits, run(blocks, expanded.params, kept).logits, "float32", "forward")
    for path, mask in kept[0].items():
        _, *moments, counts = by_path(expanded)[path]
        for values in (*moments, counts):
            assert values.shape == params[path].shape
            assert np.count_nonzero(values) == mask.nonzero * BLOCK**2 * len(mask.rows)
    # The dense phase begins with a first step of Adam for new entries, a second for stored ones.
    after = by_path(step(dense.gradients, expanded))["layers/mlp/up"]
    assert {*np.unique(after[-1])} == {1, 2}
