"""Block-sparse weights: products, layouts, whole models, gradients of blocks, training state."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.block_sparse_matmul import BlockMask
from sat_jax.config import Config, DataConfig, OptimizerConfig
from sat_jax.data.batch import Batch
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
from sat_jax.sparsity.controller import Rung
from sat_jax.sparsity.flops import forward_flops, traced_flops
from sat_jax.sparsity.plan import Stored, make_plan
from sat_jax.sparsity.stored_blocks import (
    block_grids,
    block_layout,
)
from sat_jax.train.block_gradients import block_gradients
from sat_jax.train.costs import step_flops
from sat_jax.train.optimizer import make_optimizer
from tests.conftest import slow_after
from tests.executions import ROWS, Result, differentiate, equal, plain
from tests.small_models import batch, initial_constants, neurons, random_params
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
    return tuple(block_counts("random", grids, BLOCK, density).items())


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
    assert message == (
        "sparsity.weights.block 48 does not divide layers/mlp/down [64, 32], or is no multiple of"
        " 8; accepted: 8, 16, 32"
    )


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


@pytest.mark.parametrize(
    "family", ["gpt2", *(pytest.param(f, marks=pytest.mark.slow) for f in [*MODELS][1:])]
)
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


def test_the_learning_rate_of_a_matrix_is_divided_by_its_density() -> None:
    """Weight decay scales with the learning rate."""
    stored = stored_blocks("llama")
    assert {counts.density for _, counts in stored} == {0.5}
    config = OptimizerConfig(
        learning_rate=0.1, schedule="constant", matrix_scale=0.25, weight_decay=1.0
    )
    optimizer = make_optimizer(
        config, 9, block_layout(layout_of(MODELS["llama"]), stored), (), stored
    )
    ones = {"layers/mlp/up/blocks": jnp.ones((2, 8, 2, 8, 8)), "embed": jnp.ones((7, 5))}
    added, _ = optimizer.update(ones, optimizer.init(ones), ones)
    assert_close(
        added["layers/mlp/up/blocks"], np.full((2, 8, 2, 8, 8), -0.1), "float32", "backward"
    )
    assert_close(added["embed"], np.full((7, 5), -0.2), "float32", "backward")


def test_blocks_are_cast_and_products_saved_as_those_of_other_weights() -> None:
    layout, values = layout_of(MODELS["gpt2"], Compute("bfloat16")), block_sparse("gpt2")

    def logits(values: Any) -> jax.Array:
        return layout.bind(values)(ROWS.tokens, ROWS.segment_ids, ROWS.positions)

    program = str(jax.make_jaxpr(logits)(values))
    assert "bf16[2,8,2,8,8]" not in program, "cast inside the layers, not before them"
    assert "bf16[8,2,8,8]" in program
    # Query, key, value and output; the MLP is one operation.
    assert program.count(f"name={PRODUCT}") == 4
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


@pytest.mark.parametrize("family", slow_after(1, "llama", "gpt2", "gpt_neox"))
def test_flops_that_blocks_save_are_those_of_the_traced_products(family: str) -> None:
    config, model = Config(data=DataConfig(row_length=16)), MODELS[family]
    dense, tokens = layout_of(model), jax.ShapeDtypeStruct((2, 16), jnp.int32)
    data = Batch(tokens, tokens, tokens, tokens, tokens)

    def not_counted(density: float) -> float:
        """FLOPs of a step that are traced and not counted."""
        stored = stored_blocks(family, density) if density < 1 else ()
        layout = block_layout(dense, stored)
        plan = dataclasses.replace(make_plan(neurons(model), 0.0, 0.0), stored=stored)
        trained = {p: x for p, x in layout.shapes.items() if layout.leaves[p].trained}
        rest = {p: x for p, x in layout.shapes.items() if p not in trained}

        def loss(trained: Any, rest: Any, batch: Batch) -> jax.Array:
            return next_token_loss(layout.bind({**rest, **trained}), *batch)[0]

        traced = traced_flops(jax.grad(loss), trained, rest, data)
        return traced - 32 * step_flops(config, model, Rung(0, 1, plan, 0.0, 0.0))

    # A part of attention, which blocks do not change: half of its scores are causal.
    assert not_counted(0.5) == not_counted(1.0)
