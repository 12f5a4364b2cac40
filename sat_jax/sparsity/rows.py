"""Rows of kept and omitted units in arrays `[L, *within, unit, ...]`: gather, and merge again.

Kept indices are int32, sorted and unique: `[L, kept]`, or `[L, *within, kept]` for units inside
others (query heads within their group).
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

Kept = tuple[dict[str, Any], ...]
"""Kept indices by segment and unit; a unit that is kept whole is not in the mapping."""

_PROMISES: dict[str, Any] = {
    "unique_indices": True,
    "indices_are_sorted": True,
    "mode": "promise_in_bounds",
}


def gather_rows(value: Array, kept: Int[Array, "L *within kept"], balance: int = 1) -> Array:
    """Return the kept rows along the unit's axis. `balance`: equally many are kept in each of so
    many contiguous parts."""
    rows = _in_parts(value, kept.ndim, balance)
    return _rows_at(rows, _local(kept, rows.shape[2], balance), kept.ndim, **_PROMISES)


def gather_complement(value: Array, kept: Int[Array, "L *within kept"], balance: int = 1) -> Array:
    """Return the other rows, sorted: equally many of each part."""
    rows = _in_parts(value, kept.ndim, balance)
    places = complement(_local(kept, rows.shape[2], balance), rows.shape[2])
    return _rows_at(rows, places, kept.ndim, **_PROMISES)


def merge_rows(
    kept_rows: Array, omitted_rows: Array, kept: Int[Array, "L *within kept"], balance: int = 1
) -> Array:
    """Return the full array: the inverse of `gather_rows` and `gather_complement`."""
    axes = kept.ndim
    compact, omitted = (_in_parts(x, axes, balance) for x in (kept_rows, omitted_rows))
    if not compact.shape[2]:
        return omitted_rows
    if not omitted.shape[2]:
        return kept_rows
    total = compact.shape[2] + omitted.shape[2]
    is_kept = indicator(_local(kept, total, balance), total)

    def spread(rows: Array, kind: Array) -> Array:
        # The n-th unit of its kind has the n-th row; where the other kind is, any row will do.
        rank = jnp.maximum(jnp.cumsum(kind, axis=-1) - 1, 0)
        return _rows_at(rows, rank, axes, mode="promise_in_bounds")

    compact, omitted = spread(compact, is_kept), spread(omitted, ~is_kept)
    is_kept = is_kept.reshape(compact.shape[:axes])
    return jnp.where(jnp.expand_dims(is_kept, range(axes, compact.ndim)), compact, omitted)


def complement(kept: Int[Array, "*lead kept"], size: int) -> Int[Array, "*lead omitted"]:
    """Return the indices below `size` that are not kept, sorted."""
    omitted = size - kept.shape[-1]
    indices: Array = jnp.argsort(indicator(kept, size), axis=-1, stable=True)[..., :omitted]
    return indices.astype(kept.dtype)  # False comes first


def indicator(kept: Int[Array, "*lead kept"], size: int) -> Bool[Array, "*lead {size}"]:
    """Return True where an index below `size` is kept."""
    nothing = jnp.zeros((*kept.shape[:-1], size), bool)
    return jnp.put_along_axis(nothing, kept, True, axis=-1, inplace=False)


def add_at_rows(value: Array, more: Array, kept: Int[Array, "L *within kept"]) -> Array:
    """Return the array with `more` added to the kept rows."""
    places = jnp.ogrid[tuple(slice(size) for size in kept.shape)][:-1]
    return value.at[*places, kept].add(more, **_PROMISES)


def gather_layer(value: Array, kept: Array | None, layer: Int[Array, ""]) -> Array:
    """Return the kept rows of one layer, `[1, ...]`; of all units where `kept` is None."""
    if kept is None:
        return jax.lax.dynamic_slice_in_dim(value, layer, 1)
    return value.at[_places(kept, layer)].get(**_PROMISES)[None]


def scatter_layer(value: Array, rows: Array, kept: Array | None, layer: Int[Array, ""]) -> Array:
    """Return the array with what `gather_layer` returned written back; in place where nothing else
    needs the old entries."""
    if kept is None:
        return jax.lax.dynamic_update_slice_in_dim(value, rows, layer, 0)
    return value.at[_places(kept, layer)].set(rows[0], **_PROMISES)


def _places(kept: Int[Array, "L *within kept"], layer: Int[Array, ""]) -> tuple[Array, ...]:
    """Return an index for each axis that together are the places of a layer's kept rows."""
    of_layer = kept[layer]
    within = jnp.ogrid[tuple(slice(size) for size in of_layer.shape)][:-1]
    return layer, *within, of_layer


def _in_parts(value: Array, axes: int, balance: int) -> Array:
    """Return `[L, parts, rows, ...]` of `[L, units, ...]`; of units within others, `axes` being 3,
    `[L, outer, units, ...]` as it is: these are indexed within the outer unit already.

    Outermost units are selected evenly in `balance` parts; with indices local to each part gathers
    are batched over parts, so that on a mesh whose `tensor` axis divides `balance` nothing leaves
    its device.
    """
    if axes == 3:
        return value
    return value.reshape(len(value), balance, value.shape[1] // balance, *value.shape[2:])


def _local(
    kept: Int[Array, "L *within kept"], size: int, balance: int
) -> Int[Array, "L parts kept_of_each"]:
    """Return kept indices within their part of `size` units."""
    if kept.ndim == 3:
        return kept
    starts = jnp.arange(balance, dtype=kept.dtype)[None, :, None] * size
    return _in_parts(kept, kept.ndim, balance) - starts


def _rows_at(rows: Array, places: Int[Array, "L parts n"], axes: int, **promises: Any) -> Array:
    """Return rows at these places of each part; parts of outermost units side by side again."""
    gathered = jax.vmap(jax.vmap(lambda w, i: w.at[i].get(**promises)))(rows, places)
    return gathered if axes == 3 else gathered.reshape(len(rows), -1, *rows.shape[3:])
