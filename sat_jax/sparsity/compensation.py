"""What kept neurons say for omitted ones, by least squares over the tokens that probes have seen.

Outputs of the omitted neurons are predicted from those of the kept ones. What they would have added
to the residual stream is then a product of the kept outputs with one more matrix, which is added to
the kept rows of the output matrix for as long as the neurons are omitted: no step computes more.
(Pruned layers are reconstructed so by He et al., arXiv:1707.06168; here nothing is pruned for good,
and the weights themselves stay as they are.)
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from sat_jax.sparsity.masks import Masks
from sat_jax.sparsity.neurons import at_kept, others
from sat_jax.sparsity.plan import Plan
from sat_jax.sparsity.statistics import Products


def compensation(
    params: Mapping[str, Array], products: Products, masks: Masks, plan: Plan
) -> dict[str, Array]:
    """What the kept rows of output matrices get, by the paths of the modules' variables: as much as
    `compact` keeps of `output` and `down`. `params` are those of the whole model."""
    values: dict[str, Array] = {}
    for number, (segment, mask) in enumerate(zip(plan.segments, masks, strict=True)):
        layers = slice(segment.start, segment.stop)
        if mask.heads is not None:
            rows = params["layers/attention/output"][layers]
            offset = _offsets(rows, products.heads[layers], mask.heads)
            values[f"layers/{number}/attention/output_offset"] = offset
        if mask.channels is not None:
            rows = params["layers/mlp/down"][layers]
            offset = _offsets(rows, products.channels[layers], mask.channels)
            values[f"layers/{number}/mlp/down_offset"] = offset
    return values


def _offsets(
    rows: Float[Array, "L *neurons D"],
    products: Float[Array, "L C C"],
    kept: Int[Array, "L *K kept"],
) -> Float[Array, "L *kept_neurons D"]:
    """For each layer, one after the other: C columns are those of all its neurons."""
    return jax.lax.map(lambda layer: _offset(*layer), (rows, products, kept))


def _offset(
    rows: Float[Array, "*neurons D"], products: Float[Array, "C C"], kept: Int[Array, "*K kept"]
) -> Float[Array, "*kept_neurons D"]:
    """Ridge regression, each kept column's penalty being its own sum of squares: at any scale of
    the columns the same, and finite where tokens are fewer than columns."""
    width = rows.shape[-1]
    column = jnp.arange(len(products)).reshape(rows.shape[:-1])
    here = at_kept(column, kept).reshape(-1)
    there = at_kept(column, others(kept, rows.shape[kept.ndim - 1])).reshape(-1)
    squares = products[here][:, here]
    own = jnp.diagonal(squares)
    # Columns that have been 0 all along predict nothing, and stay out of it.
    penalty = jnp.where(own > 0, own, 1.0)
    missing = products[here][:, there] @ rows.reshape(-1, width)[there]
    factor = jax.scipy.linalg.cho_factor(squares + jnp.diag(penalty))
    offset = jax.scipy.linalg.cho_solve(factor, missing)
    return offset.reshape(at_kept(rows, kept).shape)
