"""Conversion of a state in chunks: the same as at once, with the source freed."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax
import pytest

from sat_jax.models.build import layout_of
from sat_jax.sparsity.execution.base import Execution
from sat_jax.sparsity.execution.gather import Gather
from sat_jax.sparsity.execution.mask import Mask
from sat_jax.sparsity.execution.state import TrainState, new_state, path_trees
from sat_jax.sparsity.plan import make_plan
from sat_jax.train import moves
from sat_jax.train.moves import Moves, compile_moves
from tests.conftest import slow_after
from tests.executions import equal
from tests.small_models import CONFIGS, compact_state, neurons, random_kept, random_params

CONFIG = CONFIGS["bias"]
PLAN = make_plan(neurons(CONFIG), 0.5, 0.5, dense_layers=(1,))
KEPT = random_kept(CONFIG, PLAN)
GATHER = Gather(layout_of(CONFIG), PLAN)


def full_state() -> TrainState:
    """A full state whose moments differ from its parameters."""
    state = new_state(jax.device_put(random_params(CONFIG)), optax.adam(1.0))
    return jax.tree.map(lambda leaf: leaf + 1, state)


def compile_all(execution: Execution = GATHER) -> tuple[Moves, int]:
    """The moves, and how many programs they have."""
    count = 0

    def compiled(function: Callable[..., Any], *args: Any, **jit: Any) -> Any:
        nonlocal count
        count += 1
        return jax.jit(function, **jit).lower(*args).compile()

    state = jax.eval_shape(full_state)
    return compile_moves(state, KEPT, execution, lambda tree: tree, compiled), count


@pytest.mark.parametrize("largest", slow_after(1, 5000, 1, 2**30))
def test_chunks_of_any_size_give_the_same_state(
    largest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(moves, "_CHUNK", largest)
    programs, count = compile_all()
    assert (count == 2) == (largest == 2**30)  # parameters and both moments share programs
    compact, omitted = programs.compact(full_state(), KEPT)
    equal((compact, omitted), compact_state(GATHER, full_state(), KEPT))
    equal(programs.expand(compact, omitted, KEPT), full_state())


def test_no_chunk_is_too_large_or_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moves, "_CHUNK", 100)
    sizes = {"a": 60, "b": 40, "c": 1, "d": 500, "e": 7}
    tree = {name: np.zeros(size, np.int8) for name, size in sizes.items()}
    assert [list(part) for part in moves._chunks(tree)] == [["a", "b"], ["c"], ["d"], ["e"]]


@pytest.mark.parametrize("kind", [Gather, Mask])
def test_the_source_is_freed(kind: type[Execution]) -> None:
    programs, _ = compile_all(kind(GATHER.layout, PLAN))
    full = full_state()
    compact, omitted = programs.compact(full, KEPT)
    assert all(leaf.is_deleted() for leaf in arrays(full))
    assert bytes_of(arrays(compact) + jax.tree.leaves(omitted)) == bytes_of(arrays(full_state()))
    expanded = programs.expand(compact, omitted, KEPT)
    assert all(leaf.is_deleted() for leaf in arrays(compact) + jax.tree.leaves(omitted))
    equal(expanded, full_state())


def arrays(state: TrainState) -> list[jax.Array]:
    """All arrays but the scalars between the trees."""
    trees = [tree for tree in path_trees(state)[0] if isinstance(tree, dict)]
    return jax.tree.leaves(trees)


def bytes_of(leaves: list[jax.Array]) -> int:
    return sum(leaf.nbytes for leaf in leaves)
