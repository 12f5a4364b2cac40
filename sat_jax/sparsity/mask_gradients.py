"""Gradients of masks: by how much the loss changes, to first order, with each unit."""

from collections.abc import Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from sat_jax.nn.context import Observable
from sat_jax.nn.decoder import Decoder
from sat_jax.nn.layout import Layout
from sat_jax.nn.loss import next_token_loss
from sat_jax.sparsity.statistics import Statistics, statistics_of


def mask_gradients(
    layout: Layout[Decoder],
    params: Mapping[str, Array],
    batch: Any,
    observe: Collection[Observable] = (),
) -> Statistics:
    """Return the gradients of the summed loss with respect to a mask of ones on the innermost units
    of every branch, and what is observed in the same forward pass.

    Each is Σ⟨a, ∂L/∂a⟩ of a unit's activation a, which is also Σ w · ∂L/∂w of its output weights.
    `batch` has the fields of `data.batch.Batch`.
    """
    count = jnp.sum(batch.segment_ids > 0).astype(jnp.float32)

    def loss(masks: dict[str, Array]) -> tuple[Array, Statistics]:
        model = layout.bind(params, masks)
        total, observed = next_token_loss(model, *batch, observe=observe)
        return total, statistics_of(count, observed)

    gradients, seen = jax.grad(loss, has_aux=True)(_ones(layout))
    return seen._replace(gradients=gradients)


def _ones(layout: Layout[Decoder]) -> dict[str, Array]:
    """Return a mask of ones `[L, *units]` for the innermost units of every branch."""
    masks = {}
    for branch in layout.branches.values():
        sizes = [layout.units[unit].size for unit in branch.units]
        masks[branch.units[-1]] = jnp.ones((layout.layers, *sizes))
    return masks
