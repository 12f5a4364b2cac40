"""What the next update of each unit is worth, from the gradient of some tokens."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from sat_jax.data.batch import Batch
from sat_jax.nn.decoder import Decoder
from sat_jax.nn.layout import Layout
from sat_jax.nn.loss import next_token_loss
from sat_jax.sparsity.statistics import UpdateSums

Updates = Callable[[dict[str, Array]], Mapping[str, Array]]


def observe_updates(
    layout: Layout[Decoder],
    params: Mapping[str, Array],
    batch: Batch,
    updates: Updates | None = None,
) -> dict[str, UpdateSums]:
    """Return the sums of each unit's parameters, `[L, *within, units]` by name of the unit.

    `updates` returns the optimizer's changes of the parameters for a gradient of the mean loss;
    None: gradient descent with a learning rate of 1.
    """
    trained = {path: x for path, x in params.items() if layout.leaves[path].trained}
    tokens = jnp.sum(batch.segment_ids > 0).astype(jnp.float32)

    def mean_loss(trained: dict[str, Array]) -> Array:
        total, _ = next_token_loss(layout.bind({**params, **trained}), *batch)
        return total / jnp.maximum(jnp.sum(batch.loss_mask), 1)

    gradients = jax.grad(mean_loss)(trained)
    changes = updates(gradients) if updates else jax.tree.map(jnp.negative, gradients)
    trees = (
        jax.tree.map(jnp.abs, gradients),
        jax.tree.map(jnp.square, gradients),
        jax.tree.map(lambda g, change: -g * change, gradients, dict(changes)),
    )
    return {
        unit: UpdateSums(*(tokens * _sum_by_unit(layout, unit, tree) for tree in trees))
        for unit in layout.units
    }


def _sum_by_unit(layout: Layout[Any], unit: str, values: Mapping[str, Array]) -> Array:
    """Return the sum over all entries that belong to each unit of this name."""
    sums = []
    for path, value in values.items():
        axes = layout.leaves[path].axes
        if unit in axes:
            sums.append(jnp.sum(value, axis=tuple(range(axes.index(unit) + 1, len(axes)))))
    return jnp.sum(jnp.stack(sums), axis=0)
