"""Training states with block-sparse matrices: conversions, norms of blocks, one step."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sat_jax.config import OptimizerConfig
from sat_jax.models.build import layout_of
from sat_jax.nn.block_sparse import take_blocks
from sat_jax.nn.layout import flat_values
from sat_jax.nn.loss import next_token_loss
from sat_jax.sparsity.execution.state import TrainState, new_state, optimizer_step
from sat_jax.sparsity.stored_blocks import block_layout, block_norms, change_blocks, dense_reader
from sat_jax.train.optimizer import make_optimizer
from tests.conftest import slow_after
from tests.executions import ROWS, equal
from tests.small_models import batch, random_params
from tests.test_block_sparse import (
    BLOCK,
    MODELS,
    block_sparse,
    columns_by_path,
    entries,
    sparse_params,
    stored_blocks,
)
from tests.tolerances import assert_close


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


@pytest.mark.parametrize("family", slow_after(1, "llama", "gpt2"))
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


@pytest.mark.slow
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
