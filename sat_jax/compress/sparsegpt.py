"""SparseGPT (Frantar and Alistarh, arXiv:2301.00774): pruning with an update of what remains.

Columns are eliminated from left to right. When a weight is removed, the remaining weights of its
row to the right are changed such that the output changes least, over the calibration inputs.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from sat_jax.compress.elimination import (
    Columns,
    Triangle,
    eliminate_block,
    eliminate_columns,
)
from sat_jax.compress.input_statistics import InputStatistics
from sat_jax.compress.patterns import Pattern


def sparsegpt(
    weight: Float[Array, "out in"], statistics: InputStatistics, pattern: Pattern, block: int
) -> tuple[Float[Array, "out in"], Bool[Array, "out in"]]:
    """Return the pruned and updated weights, and which of them are removed.

    Within each `block` of columns, weights are selected by their score w² / U_jj², with the weights
    as they are at the start of the block; those of an N:M pattern at the start of each group.
    U is the `inverse_factor` of the statistics. A column whose inputs are all 0 is set to 0 before.
    """
    factor = jnp.asarray(statistics.inverse_factor, jnp.float32)
    weight = jnp.where(jnp.asarray(statistics.squares == 0)[None], 0, weight)
    removed = []
    for start in range(0, weight.shape[1], block):
        width = min(block, weight.shape[1] - start)
        weight, chosen = _prune_block(weight, factor, start, width=width, pattern=pattern)
        removed.append(chosen)
    mask = jnp.concatenate(removed, axis=1)
    return jnp.where(mask, 0, weight), mask


@functools.partial(jax.jit, static_argnames=("width", "pattern"))
def _prune_block(
    weight: Float[Array, "out in"],
    factor: Float[Array, "in in"],
    start: int,
    *,
    width: int,
    pattern: Pattern,
) -> tuple[Float[Array, "out in"], Bool[Array, "out width"]]:
    """Eliminate the columns [start, start + width); return all weights and the removed of these."""
    group = pattern.group if pattern.group > 1 else width

    def eliminate(columns: Columns, triangle: Triangle) -> tuple[Columns, Array]:
        def prune_group(number: Array, carry: tuple[Array, ...]) -> tuple[Array, ...]:
            columns, removed, errors = carry
            first = number * group
            scores = jnp.square(columns / jnp.diagonal(triangle)[None])
            chosen = pattern.removed(jax.lax.dynamic_slice_in_dim(scores, first, group, axis=1))
            removed = jax.lax.dynamic_update_slice_in_dim(removed, chosen, first, axis=1)

            def without_removed(column: Array, number: Array) -> Array:
                return jnp.where(removed[:, number], 0, column)

            columns, errors = eliminate_columns(
                columns, errors, triangle, first, first + group, without_removed
            )
            return columns, removed, errors

        carry = (columns, jnp.zeros(columns.shape, bool), jnp.zeros_like(columns))
        _, removed, errors = jax.lax.fori_loop(0, width // group, prune_group, carry)
        return errors, removed

    return eliminate_block(weight, factor, start, width, eliminate)
