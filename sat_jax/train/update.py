"""What the optimizer does to a state: at once, or in place and layer by layer."""

from typing import Any

import jax
import optax
from jaxtyping import Array, Float

from sat_jax.sparsity.masks import Masks
from sat_jax.sparsity.neurons import put_layer, take_layer
from sat_jax.train.state import PARAMS, TrainState, keyed_trees


def update(
    optimizer: optax.GradientTransformation,
    grads: dict[str, Array],
    factor: Float[Array, ""],
    state: TrainState,
) -> TrainState:
    """The state after one step, by `factor` times the gradients of all its parameters."""
    scaled = jax.tree.map(lambda g: factor * g, grads)
    updates, after = optimizer.update(scaled, state.optimizer, state.params)
    return TrainState(state.step + 1, optax.apply_updates(state.params, updates), after)


def update_in_place(
    optimizer: optax.GradientTransformation,
    grads: dict[str, Array],
    factor: Float[Array, ""],
    state: TrainState,
    masks: Masks,
) -> TrainState:
    """As `update`, of a state cut into segments and by gradients of its kept rows alone.

    Layer by layer, so that of the kept rows' gradients, parameters and moments no more than one
    layer's are copied. The optimizer has to be elementwise.
    """
    values, structure = keyed_trees(state)

    def step(some: list[Any], gradients: dict[str, Array]) -> list[Any]:
        part: TrainState = jax.tree.unflatten(structure, some)
        return keyed_trees(update(optimizer, gradients, factor, part))[0]

    def step_layer(layer: Array, whole: list[Any]) -> list[Any]:
        small = [take_layer(x, masks, layer) if isinstance(x, dict) else x for x in whole]
        gradients = {
            path: jax.lax.dynamic_slice_in_dim(grads[path], layer, 1) for path in small[PARAMS]
        }
        # Were they not all there before the first is written, XLA would read what it overwrites,
        # and therefore copy everything first.
        small = jax.lax.optimization_barrier(step(small, gradients))
        return [
            put_layer(part, x, masks, layer) if isinstance(x, dict) else x
            for part, x in zip(small, whole, strict=True)
        ]

    outside = _part(values, "")
    after = step(outside, {path: grads[path] for path in outside[PARAMS]})
    for number in range(len(masks)):
        inside = _part(values, f"layers/{number}/")
        layers = len(next(iter(inside[PARAMS].values())))
        done = jax.lax.fori_loop(0, layers, step_layer, inside)
        after = [a | b if isinstance(a, dict) else a for a, b in zip(after, done, strict=True)]
    updated: TrainState = jax.tree.unflatten(structure, after)
    return updated


def _part(values: list[Any], prefix: str) -> list[Any]:
    """Trees with the entries of one segment, or, where `prefix` is empty, of no segment."""

    def belongs(path: str) -> bool:
        return path.startswith(prefix) if prefix else not path.startswith("layers/")

    return [
        {path: x for path, x in tree.items() if belongs(path)} if isinstance(tree, dict) else tree
        for tree in values
    ]
