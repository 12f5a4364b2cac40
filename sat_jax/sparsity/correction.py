"""Least-squares correction of the kept output rows for the omitted units.

Outputs of omitted units are predicted from those of kept ones, over the tokens that probes have
seen. What they would have added to the residual stream is then a product of the kept outputs with
one more matrix, which is added to the kept rows of the output matrix while the units are omitted:
no step computes more. (He et al., arXiv:1707.06168, reconstruct pruned layers so; here nothing is
pruned for good, and the weights themselves do not change.)
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from sat_jax.nn.layout import Layout
from sat_jax.sparsity.plan import Plan
from sat_jax.sparsity.rows import Kept, complement, gather_rows

Corrections = Mapping[str, tuple[Array | None, ...]]
"""By path of an output matrix and by segment, what kept rows get; None: nothing is omitted."""


def least_squares_correction(
    layout: Layout[Any],
    params: Mapping[str, Array],
    products: Mapping[str, Float[Array, "L C C"]],
    kept: Kept,
    plan: Plan,
) -> Corrections:
    """Return the corrections; `params` are those of the full model."""
    corrections: dict[str, tuple[Array | None, ...]] = {}
    for path, leaf in layout.with_role("write"):
        innermost = next(name for name in reversed(leaf.axes) if name in layout.units)
        parts: list[Array | None] = []
        for segment, kept_units in zip(plan.segments, kept, strict=True):
            layers, unit = slice(segment.start, segment.stop), layout.unit_of(path, kept_units)
            if unit is None:
                parts.append(None)
                continue
            columns = products[innermost][layers]
            layer_inputs = (params[path][layers], columns, kept_units[unit])
            # Layer by layer, so that one factorisation exists at a time.
            parts.append(jax.lax.map(lambda inputs: _correct_layer(*inputs), layer_inputs))
        if any(part is not None for part in parts):
            corrections[path] = tuple(parts)
    return corrections


def _correct_layer(
    rows: Float[Array, "*units D"],
    products: Float[Array, "C C"],
    kept: Int[Array, "*within kept"],
) -> Float[Array, "*kept_units D"]:
    """Ridge regression, each kept column's penalty being its own sum of squares: at any scale of
    the columns the same, and finite where tokens are fewer than columns."""
    width = rows.shape[-1]
    column = jnp.arange(len(products)).reshape(rows.shape[:-1])
    omitted = complement(kept, rows.shape[kept.ndim - 1])
    kept_columns, omitted_columns = (
        gather_rows(column[None], indices[None]).reshape(-1) for indices in (kept, omitted)
    )
    squares = products[kept_columns][:, kept_columns]
    own = jnp.diagonal(squares)
    # Columns that have been 0 all along predict nothing, and are left out.
    penalty = jnp.where(own > 0, own, 1.0)
    missing = products[kept_columns][:, omitted_columns] @ rows.reshape(-1, width)[omitted_columns]
    factor = jax.scipy.linalg.cho_factor(squares + jnp.diag(penalty))
    correction = jax.scipy.linalg.cho_solve(factor, missing)
    return correction.reshape(gather_rows(rows[None], kept[None])[0].shape)
