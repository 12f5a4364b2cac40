"""What training changes, in full or in the form that a rung trains."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

Tree = Mapping[str, Any]
"""Arrays by path, or tuples of them with one entry for each segment."""
Value = TypeVar("Value")


class TrainState(NamedTuple):
    """Optimizer steps done, float32 parameters by path, and the optimizer's state."""

    step: Int[Array, ""]
    params: dict[str, Any]
    optimizer: Any


OmittedState = list[dict[str, Any]]
"""For each path-keyed tree of a state the rows that are not trained."""

PARAMS = TrainState._fields.index("params")  # among a state's trees


def new_state(params: dict[str, Any], optimizer: optax.GradientTransformation) -> TrainState:
    """Return the state before the first step."""
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))


def path_trees(state: TrainState) -> tuple[list[Any], Any]:
    """Return the dictionaries keyed by parameter path and the scalars between them, and the
    structure that puts them together again."""
    return jax.tree.flatten(state, is_leaf=lambda node: isinstance(node, dict))


def map_trees(function: Callable[..., Any], state: TrainState, *more: TrainState) -> TrainState:
    """Return the state with `function` applied to each path-keyed tree."""
    trees, structure = path_trees(state)
    others = [path_trees(other)[0] for other in more]
    mapped = [
        function(tree, *rest) if isinstance(tree, dict) else tree
        for tree, *rest in zip(trees, *others, strict=True)
    ]
    return jax.tree.unflatten(structure, mapped)


def map_arrays(function: Callable[..., Value], tree: Tree, *more: Tree) -> dict[str, Any]:
    """Return `function(path, array, ...)` for each array, in tuples where a path has segments."""
    result: dict[str, Any] = {}
    for path, value in tree.items():
        values = (value, *(other[path] for other in more))
        if isinstance(value, tuple):
            result[path] = tuple(function(path, *xs) for xs in zip(*values, strict=True))
        else:
            result[path] = function(path, *values)
    return result


def optimizer_step(
    optimizer: optax.GradientTransformation,
    grads: dict[str, Any],
    factor: Float[Array, ""],
    state: TrainState,
) -> TrainState:
    """Return the state after one step, by `factor` times the gradients. Parameters without a
    gradient stay as they are."""
    scaled = jax.tree.map(lambda g: factor * g, grads)
    params = {path: state.params[path] for path in grads}
    updates, after = optimizer.update(scaled, state.optimizer, params)
    updated = optax.apply_updates(params, updates)
    return TrainState(state.step + 1, {**state.params, **updated}, after)
