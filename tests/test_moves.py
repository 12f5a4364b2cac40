"""Entering and leaving a rung parcel by parcel: the same as at once, with the source freed."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax
import pytest

from sat_jax.sparsity.plan import make_plan
from sat_jax.train import moves
from sat_jax.train.moves import Moves, compile_moves
from sat_jax.train.state import TrainState, compact_state, keyed_trees, new_state
from tests.small_models import CONFIGS, neurons, random_masks, random_params

CONFIG = CONFIGS["bias"]
PLAN = make_plan(neurons(CONFIG), 0.5, 0.5, dense_layers=(1,))
MASKS = random_masks(CONFIG, PLAN)


def begin() -> TrainState:
    """A state whose moments differ from its parameters."""
    state = new_state(jax.device_put(random_params(CONFIG)), optax.adam(1.0))
    return jax.tree.map(lambda leaf: leaf + 1, state)


def compile_all(gathers: bool = True) -> tuple[Moves, int]:
    """The moves, and how many programs were compiled for them."""
    count = 0

    def compiled(function: Callable[..., Any], *args: Any, **jit: Any) -> Any:
        nonlocal count
        count += 1
        return jax.jit(function, **jit).lower(*args).compile()

    state = jax.eval_shape(begin)
    return compile_moves(state, MASKS, PLAN, gathers, lambda tree: tree, compiled), count


def equal(actual: Any, expected: Any) -> None:
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


@pytest.mark.parametrize("largest", [1, 5000, 2**30])
def test_parcels_of_any_size_come_to_the_same(
    largest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(moves, "_PARCEL", largest)
    made, count = compile_all()
    assert (count == 2) == (largest == 2**30)  # parameters and both moments share theirs
    whole = begin()
    working, resting = made.enter(whole, MASKS)
    equal((working, resting), compact_state(begin(), MASKS, PLAN))
    equal(made.leave(working, resting, MASKS), begin())


def test_no_parcel_is_larger_than_allowed_or_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moves, "_PARCEL", 100)
    sizes = {"a": 60, "b": 40, "c": 1, "d": 500, "e": 7}
    tree = {name: np.zeros(size, np.int8) for name, size in sizes.items()}
    found = list(moves._parcels(tree))
    assert [list(part) for part in found] == [["a", "b"], ["c"], ["d"], ["e"]]


@pytest.mark.parametrize("gathers", [True, False])
def test_what_is_moved_is_freed(gathers: bool) -> None:
    made, _ = compile_all(gathers)
    whole = begin()
    working, resting = made.enter(whole, MASKS)
    assert all(leaf.is_deleted() for leaf in arrays(whole))
    assert bytes_of(arrays(working) + jax.tree.leaves(resting)) == bytes_of(arrays(begin()))
    again = made.leave(working, resting, MASKS)
    assert all(leaf.is_deleted() for leaf in arrays(working) + jax.tree.leaves(resting))
    equal(again, begin())


def arrays(state: TrainState) -> list[jax.Array]:
    """All but the lone scalars."""
    return [
        leaf for tree in keyed_trees(state)[0] if isinstance(tree, dict) for leaf in tree.values()
    ]


def bytes_of(leaves: list[jax.Array]) -> int:
    return sum(leaf.nbytes for leaf in leaves)
