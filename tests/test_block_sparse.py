"""Block-sparse weights: products, layouts, whole models, gradients of blocks, training state."""

import dataclasses
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
from sat_jax.models.retnet import RetNetConfig
from sat_jax.nn.block_sparse import BlockSparse, take_blocks
from sat_jax.nn.decoder import Compute
from sat_jax.nn.layout import flat_values, make_layout
from sat_jax.nn.linear import PRODUCT
from sat_jax.nn.loss import next_token_loss
from sat_jax.sparsity.block_patterns import BlockCounts, block_counts, initial_blocks
from sat_jax.sparsity.execution.state import TrainState, new_state, optimizer_step
from sat_jax.sparsity.flops import forward_flops
from sat_jax.sparsity.plan import Stored
from sat_jax.sparsity.stored_blocks import (
    block_grids,
    block_layout,
    block_norms,
    change_blocks,
    dense_reader,
)
from sat_jax.train.block_gradients import block_gradients
from sat_jax.train.optimizer import make_optimizer
from tests.executions import ROWS, Result, differentiate, equal, plain
from tests.small_models import batch, initial_constants, random_params
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
    "retnet": RetNetConfig(**SIZES, d_value=64, norm_eps=0.1, chunk=4),
}


@functools.cache
def stored_blocks(family: str, density: float = 0.5) -> Stored:
    grids = block_grids(layout_of(MODELS[family]), "all", BLOCK)
    return tuple(block_counts("random", grids, BLOCK, density, uneven=False).items())


@functools.cache
def columns_by_path(family: str, seed: int = 1, density: float = 0.5) -> dict[str, jax.Array]:
    """Return the block columns of random blocks by path of the matrix."""
    columns = {}
    for path, counts in stored_blocks(family, density):
        kept = initial_blocks("random", path, counts, np.ones((2, *counts.grid)), seed)
        columns[path] = jnp.asarray(np.nonzero(kept)[2].reshape(2, counts.grid[0], -1), jnp.int32)
    return columns


def entries(family: str, path: str) -> np.ndarray:
    """Return True for the entries of the array at a path that are in stored blocks."""
    shape = layout_of(MODELS[family]).shapes[path].shape
    columns = np.asarray(columns_by_path(family)[path])
    kept = np.zeros((*columns.shape[:2], shape[-1] // BLOCK), bool)
    np.put_along_axis(kept, columns, True, axis=2)
    return kept.repeat(BLOCK, axis=1).repeat(BLOCK, axis=2).reshape(shape)


@functools.cache
def sparse_params(family: str) -> dict[str, np.ndarray]:
    """Return full parameters with zeros outside the stored blocks."""
    params = dict(random_params(MODELS[family]))
    return params | {p: params[p] * entries(family, p) for p, _ in stored_blocks(family)}


def weight_of(array: Any, columns: jax.Array, counts: BlockCounts) -> BlockSparse:
    return BlockSparse.of(jnp.asarray(array), columns, counts.longest)


def block_sparse(family: str) -> dict[str, Any]:
    """Return `sparse_params` with block-sparse weights."""
    params, columns = sparse_params(family), columns_by_path(family)
    return params | {p: weight_of(params[p], columns[p], c) for p, c in stored_blocks(family)}


# --- Weights ---

# Rows of blocks 0, 1 and 2 store the block columns 1 and 2, 0 and 2, 0 and 1 of three.
COLUMNS = jnp.array([[1, 2], [0, 2], [0, 1]], jnp.int32)
ARRAY = np.random.default_rng(0).normal(size=(3, 8, 24)).astype(np.float32)  # units 3 and 8
WEIGHT = BlockSparse.of(jnp.asarray(ARRAY), COLUMNS, longest=2)


def test_blocks_of_an_array_and_the_array_again() -> None:
    assert (WEIGHT.shape, WEIGHT.width) == ((3, 8, 24), 3)
    expected = [[ARRAY[r, :, 8 * c : 8 * c + 8] for c in row] for r, row in enumerate(COLUMNS)]
    np.testing.assert_array_equal(WEIGHT.blocks, expected)
    zeroed = ARRAY.copy()
    for row, column in enumerate((0, 1, 2)):
        zeroed[row, :, 8 * column : 8 * column + 8] = 0
    np.testing.assert_array_equal(WEIGHT.dense(), zeroed)


def test_products_and_gradients_are_those_of_the_dense_array() -> None:
    rng = np.random.default_rng(1)
    x, a = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((2, 5, 24), (2, 5, 3, 8)))
    dense = WEIGHT.dense()
    assert_close(WEIGHT.project(x), jnp.einsum("BTD,ngD->BTng", x, dense), "float32", "product")
    assert_close(WEIGHT.combine(a), jnp.einsum("BTng,ngD->BTD", a, dense), "float32", "product")

    def scalar(blocks: jax.Array) -> jax.Array:
        own = dataclasses.replace(WEIGHT, blocks=blocks)
        return jnp.sum(own.project(x) * a) + jnp.sum(own.combine(a) * jnp.sin(x))

    gradient = jnp.einsum("BTD,BTng->ngD", x + jnp.sin(x), a)
    expected = take_blocks(gradient, COLUMNS)
    assert_close(jax.grad(scalar)(WEIGHT.blocks), expected, "float32", "product")


@pytest.mark.parametrize(("block", "implementation"), [(8, None), (128, "pallas_tpu")])
def test_layers_may_have_block_columns_of_unequal_length(block: int, implementation: Any) -> None:
    columns = jnp.array(
        [
            [[0], [1], [2], [3], [0], [1]],
            [[0], [1], [2], [0], [0], [1]],  # column 3 is empty, column 0 has three blocks
        ]
    )
    rng = np.random.default_rng(2)
    arrays, x, a = (
        jnp.asarray(rng.normal(size=shape), jnp.float32)
        for shape in ((2, 6 * block, 4 * block), (1, 8, 4 * block), (1, 8, 6 * block))
    )
    weight = BlockSparse.of(arrays, columns, longest=3)
    weight = dataclasses.replace(weight, implementation=implementation)

    def layer(_: None, one: BlockSparse) -> tuple[None, Any]:
        return None, (one.project(x), one.combine(a), one.dense())

    _, (read, written, dense) = jax.lax.scan(layer, None, weight)
    np.testing.assert_array_equal(weight.dense(), dense)
    for n in range(2):
        assert_close(read[n], x @ dense[n].T, "float32", "product")
        assert_close(written[n], a @ dense[n], "float32", "product")


def test_a_balanced_mask_is_the_mask_of_the_same_blocks() -> None:
    kept = np.zeros((3, 3), bool)
    np.put_along_axis(kept, np.asarray(COLUMNS), True, axis=1)
    mask, expected = BlockMask.balanced(COLUMNS, 3, 8, longest=2), BlockMask.of(kept, 8)
    for field in ("rows", "columns", "by_row", "row_lists", "column_lists"):
        equal(getattr(mask, field), getattr(expected, field))
    used = np.asarray(mask.by_column.valid) > 0
    assert used.sum() == 6 and len(used) == 9, "a padding entry for each block column"
    for field in ("result", "reduction", "slot"):
        visited = np.asarray(getattr(mask.by_column, field))[used]
        np.testing.assert_array_equal(visited, getattr(expected.by_column, field))


def test_a_block_that_does_not_divide_a_matrix_is_refused() -> None:
    message = user_error(lambda: block_grids(layout_of(MODELS["gpt2"]), "mlp", 48))
    assert message == "block 48 of layers/mlp/down [64, 32]; accepted: 8, 16, 32"


def test_matrices_by_branch() -> None:
    layout = layout_of(MODELS["llama"])
    names = {b: [*block_grids(layout, b, BLOCK)] for b in ("all", "attention", "mlp")}
    assert {p.split("/")[1] for p in names["attention"]} == {"attention"}
    assert {p.split("/")[2] for p in names["mlp"]} == {"gate", "up", "down"}
    assert sorted(names["attention"] + names["mlp"]) == sorted(names["all"])
    assert block_grids(layout, "mlp", BLOCK)["layers/mlp/up"] == (8, 4)


# --- Models ---


@functools.cache
def dense_result(family: str) -> Result:
    """Return the result of the dense model, without the gradients of constants, and of GPT-2's
    biases of keys, which is 0 in exact arithmetic."""
    result = plain(layout_of(MODELS[family]), sparse_params(family))
    for path in initial_constants(MODELS[family]):
        del result.gradients[path]
    if family == "gpt2":
        result.gradients.pop("layers/attention/key_bias")
    return result


@pytest.mark.parametrize("family", MODELS)
def test_logits_and_gradients_are_those_of_the_dense_model(family: str) -> None:
    columns = columns_by_path(family)
    model = layout_of(MODELS[family]).bind(block_sparse(family))
    layout, flat = make_layout(model), flat_values(model)
    frozen = {p: x for p, x in flat.items() if not layout.leaves[p].trained}
    trained = {p: x for p, x in flat.items() if p not in frozen}
    constants = initial_constants(MODELS[family]).keys()
    assert frozen.keys() == {f"{path}/columns" for path in columns} | constants
    result = jax.jit(lambda t: differentiate(lambda t: layout.bind(frozen | t), t))(trained)
    assert_close(result.logits, dense_result(family).logits, "float32", "forward")
    for path, gradient in dense_result(family).gradients.items():
        if path in columns:
            expected = take_blocks(gradient, columns[path])
            assert_close(result.gradients[f"{path}/blocks"], expected, "float32", "backward")
        else:
            assert_close(result.gradients[path], gradient, "float32", "backward")


def test_the_layout_of_a_model_with_blocks() -> None:
    dense = layout_of(MODELS["llama"])
    layout = block_layout(dense, stored_blocks("llama"))
    made = make_layout(dense.bind(block_sparse("llama")))
    assert (layout.leaves, layout.shapes) == (made.leaves, made.shapes)
    assert layout.units == dense.units, "sizes are those of the full arrays"
    leaf = layout.leaves["layers/mlp/up/blocks"]
    axes = ("layer", "block_row", "block", "row_of_block", "column_of_block")
    assert leaf == (axes, "read", True)
    assert layout.shapes["layers/mlp/up/blocks"].shape == (2, 8, 2, 8, 8)
    assert layout.count_axes("layers/mlp/up/blocks") == 3
    leaf = layout.leaves["layers/mlp/down/columns"]
    assert leaf == (("layer", "block_row", "index"), "index", False)
    optimizer = make_optimizer(OptimizerConfig(), 9, layout)
    adam = jax.eval_shape(lambda: optimizer.init(dict(layout.shapes))[0])
    for tree in (adam.counts, adam.mu, adam.nu):
        assert {path for path in tree if path.startswith("layers/mlp/up")} == {
            "layers/mlp/up/blocks"
        }
    assert adam.counts["layers/mlp/up/blocks"].shape == (2, 8, 2)
    half, full = (forward_flops(x, 16) for x in (layout, dense))
    assert (half.read, half.write, half.mixing) == (full.read / 2, full.write / 2, full.mixing)


def test_blocks_are_cast_and_products_saved_as_those_of_other_weights() -> None:
    layout, values = layout_of(MODELS["gpt2"], Compute("bfloat16")), block_sparse("gpt2")

    def logits(values: Any) -> jax.Array:
        return layout.bind(values)(ROWS.tokens, ROWS.segment_ids, ROWS.positions)

    program = str(jax.make_jaxpr(logits)(values))
    assert "bf16[2,8,2,8,8]" not in program, "cast inside the layers, not before them"
    assert "bf16[8,2,8,8]" in program
    assert program.count(f"name={PRODUCT}") == 3  # query, key, value; the MLP is one operation
    actual = jax.jit(logits)(values)
    assert_close(actual, dense_result("gpt2").logits, "bfloat16", "forward")


@pytest.mark.parametrize("family", ["llama", pytest.param("gpt2", marks=pytest.mark.slow)])
def test_gradients_of_all_blocks_are_those_of_the_dense_model(family: str) -> None:
    layout, stored = layout_of(MODELS[family]), stored_blocks(family)
    data, params = batch(MODELS[family]), flat_values(layout.bind(block_sparse(family)))

    def loss(params: dict[str, jax.Array]) -> jax.Array:
        return next_token_loss(layout.bind(params), *data)[0]

    dense = jax.jit(jax.grad(loss))(sparse_params(family))
    actual = jax.jit(lambda params: block_gradients(layout, stored, params, data))(params)
    assert actual.keys() == {path for path, _ in stored}
    for path, counts in stored:
        (rows, columns), gradient = counts.grid, np.asarray(dense[path], np.float64)
        blocks = gradient.reshape(2, rows, BLOCK, columns, BLOCK)
        expected = np.sqrt((blocks**2).sum(axis=(2, 4)))
        assert_close(actual[path], expected, "float32", "backward")


# --- Training state ---


def full_state(family: str) -> TrainState:
    """Return a dense state of a run that stores blocks, whose moments and counts all differ from
    zero."""
    layout, stored = layout_of(MODELS[family]), dict(stored_blocks(family))
    state = new_state(
        jax.tree.map(jnp.asarray, random_params(MODELS[family])),
        make_optimizer(OptimizerConfig(), 9, layout, by_entry=stored.keys()),
    )
    return jax.tree.map(lambda x: x + 3, state)


def to_blocks(family: str, state: TrainState, columns: Any) -> TrainState:
    return change_blocks(state, columns, layout_of(MODELS[family]).shapes)


def by_path(state: TrainState, path: str) -> tuple[Any, ...]:
    """Return the parameter, both moments and the update counts."""
    adam = state.optimizer[0]
    return state.params[path], adam.mu[path], adam.nu[path], adam.counts[path]


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_state_of_blocks_and_the_dense_state_again(family: str) -> None:
    full, columns = full_state(family), columns_by_path(family)
    sparse = to_blocks(family, full, columns)
    optimizer = make_optimizer(
        OptimizerConfig(), 9, block_layout(layout_of(MODELS[family]), stored_blocks(family))
    )
    assert jax.tree.map(jnp.shape, sparse) == jax.tree.map(
        jnp.shape, jax.eval_shape(lambda: new_state(sparse.params, optimizer))
    )
    dense = to_blocks(family, sparse, {})
    equal(to_blocks(family, dense, columns), sparse)
    for path in full.params:
        before, after = by_path(full, path), by_path(dense, path)
        if path not in columns:
            equal(after, before)
            continue
        for value, expected in zip(after, (before[0], 3.0, 3.0, 3), strict=True):
            np.testing.assert_array_equal(value, np.where(entries(family, path), expected, 0))


def test_exchanged_blocks_start_at_zero() -> None:
    old, new = columns_by_path("llama"), columns_by_path("llama", seed=2)
    state = to_blocks("llama", full_state("llama"), old)
    exchanged = to_blocks("llama", state, new)
    equal(exchanged, to_blocks("llama", to_blocks("llama", state, {}), new))
    path = "layers/mlp/up"
    was_stored = (new[path][..., None] == old[path][..., None, :]).any(axis=-1)
    assert 0 < was_stored.sum() < was_stored.size
    counts = exchanged.optimizer[0].counts[f"{path}/blocks"]
    np.testing.assert_array_equal(counts, np.where(was_stored, 3, 0))


def test_blocks_are_added() -> None:
    few = {path: columns[..., 1:] for path, columns in columns_by_path("llama").items()}
    state = to_blocks("llama", full_state("llama"), few)
    more = to_blocks("llama", state, columns_by_path("llama"))
    equal(more, to_blocks("llama", to_blocks("llama", state, {}), columns_by_path("llama")))


def test_norms_of_blocks() -> None:
    stored, shapes = stored_blocks("llama"), layout_of(MODELS["llama"]).shapes
    dense = block_norms(sparse_params("llama"), stored, shapes)
    state = to_blocks("llama", full_state("llama"), columns_by_path("llama"))
    params = state.params | {
        f"{p}/blocks": take_blocks(jnp.asarray(sparse_params("llama")[p]), c)
        for p, c in columns_by_path("llama").items()
    }
    for path, counts in stored:
        (rows, columns), array = counts.grid, sparse_params("llama")[path]
        expected = np.abs(array).reshape(2, rows, BLOCK, columns, BLOCK).mean(axis=(2, 4))
        assert_close(dense[path], expected, "float32", "forward")
        assert_close(block_norms(params, stored, shapes)[path], expected, "float32", "forward")


def test_dense_parameters_are_read_from_blocks() -> None:
    columns, params = columns_by_path("gpt2"), sparse_params("gpt2")
    layout = layout_of(MODELS["gpt2"])
    stored = {p: np.asarray(x) for p, x in flat_values(layout.bind(block_sparse("gpt2"))).items()}
    read = dense_reader(stored.__getitem__, stored.keys(), layout.shapes)
    for path in layout.leaves:
        np.testing.assert_array_equal(read(path), params[path])
    assert "layers/mlp/up" in columns


def test_only_stored_blocks_have_state_and_the_rest_starts_at_zero() -> None:
    dense, columns = layout_of(MODELS["gpt2"]), columns_by_path("gpt2")
    layout = block_layout(dense, stored_blocks("gpt2"))
    params = {p: jnp.asarray(x) for p, x in flat_values(dense.bind(block_sparse("gpt2"))).items()}
    data = batch(MODELS["gpt2"])

    def step(layout: Any, state: TrainState, optimizer: Any) -> TrainState:
        def loss(trained: Any) -> jax.Array:
            return next_token_loss(layout.bind(state.params | trained), *data)[0]

        trained = {p: x for p, x in state.params.items() if layout.leaves[p].trained}
        return optimizer_step(optimizer, jax.grad(loss)(trained), jnp.float32(1), state)

    sparse_optimizer = make_optimizer(OptimizerConfig(), 9, layout)
    state = new_state(params, sparse_optimizer)
    for path in columns:
        for tree in (state.params, state.optimizer[0].mu, state.optimizer[0].nu):
            assert tree[f"{path}/blocks"].nbytes == dense.shapes[path].size * 4 // 2
    state = jax.jit(lambda s: step(layout, s, sparse_optimizer))(state)
    expanded = to_blocks("gpt2", state, {})
    logits = [
        jax.jit(lambda p, f=form: f.bind(p)(ROWS.tokens))(params)
        for form, params in ((layout, state.params), (dense, expanded.params))
    ]
    assert_close(logits[1], logits[0], "float32", "forward")
    optimizer = make_optimizer(OptimizerConfig(), 9, dense, by_entry=columns.keys())
    # The dense phase begins with a first step of Adam for new entries, a second for stored ones.
    after = jax.jit(lambda s: step(dense, s, optimizer))(expanded)
    for path in columns:
        np.testing.assert_array_equal(
            after.optimizer[0].counts[path], np.where(entries("gpt2", path), 2, 1)
        )
