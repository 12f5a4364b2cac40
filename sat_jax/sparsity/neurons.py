"""Where neurons live in the parameters, and moving between the whole model and what is kept of it.

Between two refreshes the kept neurons form a smaller dense model. `compact` parts a whole tree
(parameters, moments or update counts: anything keyed by parameter path) into it and the omitted
neurons, which rest; `expand` puts both together, bit for bit. A whole tree stacks all layers
(`layers/mlp/gate`), a parted one numbers its segments: what is kept (`layers/0/mlp/gate`) and what
is not (`layers/0/omitted/mlp/gate`). What no segment gathers is moved, not copied.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from sat_jax.sparsity.masks import Masks, SegmentMasks
from sat_jax.sparsity.plan import Plan

_GROUP_LEAVES = frozenset({"key", "value", "key_bias", "value_bias"})
_HEAD_LEAVES = frozenset({"query", "output", "query_bias"})
_CHANNEL_LEAVES = frozenset({"gate", "up", "down"})


def neuron_axes(path: str) -> int:
    """Leading axes that say which neuron an entry belongs to: L and the neuron axes after it for
    heads and channels, L alone for other layer parameters, none outside the layers."""
    if not path.startswith("layers/"):
        return 0
    leaf = _leaf(path)
    return 1 + 2 * (leaf in _HEAD_LEAVES) + (leaf in _GROUP_LEAVES | _CHANNEL_LEAVES)


def compact(
    whole: Mapping[str, Array], masks: Masks, plan: Plan
) -> tuple[dict[str, Array], dict[str, Array]]:
    """(compact tree, resting tree): the kept rows, and the omitted ones, which stay as they are
    until `expand`. Together as large as the whole tree; nothing is in both."""
    small: dict[str, Array] = {}
    resting: dict[str, Array] = {}
    for path, value in whole.items():
        if not path.startswith("layers/"):
            small[path] = value
            continue
        for number, (segment, mask) in enumerate(zip(plan.segments, masks, strict=True)):
            part = value if len(masks) == 1 else value[segment.start : segment.stop]
            kept = _kept(path, mask)
            if kept is not None:
                resting[_omitted_path(path, number)] = _take_others(part, kept, plan.balance)
                part = _take(part, kept, plan.balance)
            small[_segment_path(path, number)] = part
    return small, resting


def expand(
    small: Mapping[str, Array], resting: Mapping[str, Array], masks: Masks, plan: Plan
) -> dict[str, Array]:
    """The whole tree: the inverse of `compact`."""
    whole: dict[str, Array] = {}
    for path, value in small.items():
        if not path.startswith("layers/"):
            whole[path] = value
        elif path.startswith("layers/0/"):
            name = f"layers/{path.removeprefix('layers/0/')}"
            whole[name] = _together(name, {**small, **resting}, masks, plan)
    return whole


def _together(path: str, rows: Mapping[str, Array], masks: Masks, plan: Plan) -> Array:
    """The whole array of which all segments have `rows`, kept and omitted."""
    parts = []
    for number, mask in enumerate(masks):
        part, kept = rows[_segment_path(path, number)], _kept(path, mask)
        if kept is not None:
            part = _merge(part, rows[_omitted_path(path, number)], kept, plan.balance)
        parts.append(part)
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts)


def mask_values(masks: Masks) -> dict[str, Array]:
    """The masks by the paths of the modules' `Mask` variables."""
    values: dict[str, Array] = {}
    for number, mask in enumerate(masks):
        if mask.heads is not None:
            values[f"layers/{number}/attention/kept_heads"] = mask.heads
        if mask.channels is not None:
            values[f"layers/{number}/mlp/kept_channels"] = mask.channels
    return values


def omitted_values(small: Mapping[str, Array], resting: Mapping[str, Array]) -> dict[str, Array]:
    """Of parameters that `compact` has parted what computes the omitted neurons: the resting rows,
    and beside them what such a module shares with the one of the kept neurons."""
    modules = {path.rpartition("/")[0] for path in resting}
    values: dict[str, Array] = {}
    for path, value in small.items():
        _, _, within = path.partition("/")
        number, _, rest = within.partition("/")
        place = _omitted_path(f"layers/{rest}", int(number)) if number.isdigit() else ""
        if place.rpartition("/")[0] in modules:
            values[place] = resting.get(place, value)
    return values


def in_place_values(cut: Mapping[str, Array], masks: Masks) -> dict[str, Array]:
    """Of a tree cut into segments what kernel execution computes with, by the paths of the modules'
    variables: which neurons are kept, and the whole matrices that these are rows of."""
    values: dict[str, Array] = {}
    for path, value, kept in _with_kept(cut, masks):
        if kept is not None:
            whole = f"{path.rpartition('/')[0]}/whole"
            values |= {f"{whole}/kept": kept, f"{whole}/{_leaf(path)}": value}
    return values


def take_kept(cut: Mapping[str, Array], masks: Masks) -> dict[str, Array]:
    """Of a tree cut into segments the kept rows: what `compact` makes of a whole tree."""
    return {
        path: value if kept is None else _take(value, kept)
        for path, value, kept in _with_kept(cut, masks)
    }


def take_layer(
    cut: Mapping[str, Array], masks: Masks, layer: int | Int[Array, ""]
) -> dict[str, Array]:
    """As `take_kept`, of one layer of one segment: entries of that segment alone, L being 1."""
    return {
        path: jax.lax.dynamic_slice_in_dim(value, layer, 1)
        if kept is None
        else value.at[_places(kept, layer)].get(**_PROMISES)[None]
        for path, value, kept in _with_kept(cut, masks)
    }


def put_layer(
    small: Mapping[str, Array],
    cut: Mapping[str, Array],
    masks: Masks,
    layer: int | Int[Array, ""],
) -> dict[str, Array]:
    """What `take_layer` takes written back; in place where nothing else needs the entries."""
    return {
        path: jax.lax.dynamic_update_slice_in_dim(value, small[path], layer, 0)
        if kept is None
        else value.at[_places(kept, layer)].set(small[path][0], **_PROMISES)
        for path, value, kept in _with_kept(cut, masks)
    }


def _places(kept: Int[Array, "L *K kept"], layer: int | Int[Array, ""]) -> tuple[int | Array, ...]:
    """An index for each neuron axis that together say where a layer's kept rows are."""
    return layer, *_in_layer(kept[layer])


def _in_layer(kept: Int[Array, "*K kept"]) -> tuple[Array, ...]:
    groups = jnp.ogrid[tuple(slice(size) for size in kept.shape)][:-1]
    return *groups, kept


def at_kept(rows: Array, kept: Int[Array, "*K kept"]) -> Array:
    """The kept neurons' rows of one layer's array."""
    taken: Array = rows.at[_in_layer(kept)].get(**_PROMISES)
    return taken


def add_at_kept(rows: Array, more: Array, kept: Int[Array, "*K kept"]) -> Array:
    """One layer's array with `more` added to the kept neurons' rows."""
    added: Array = rows.at[_in_layer(kept)].add(more, **_PROMISES)
    return added


def keep_only(new: Mapping[str, Array], old: Mapping[str, Array], masks: Masks) -> dict[str, Array]:
    """`new` where a neuron is kept and `old` where it is omitted, for trees cut into segments."""
    merged: dict[str, Array] = {}
    for path, value, indices in _with_kept(new, masks):
        if indices is not None:
            lead = indices.ndim - 1
            nothing = jnp.zeros(value.shape[: lead + 1], bool)
            keep = jnp.put_along_axis(nothing, indices, True, axis=-1, inplace=False)
            value = jnp.where(jnp.expand_dims(keep, range(lead + 1, value.ndim)), value, old[path])
        merged[path] = value
    return merged


def _leaf(path: str) -> str:
    return path.rsplit("/", 1)[-1]


def _segment_path(path: str, number: int) -> str:
    return f"layers/{number}/{path.removeprefix('layers/')}"


def _omitted_path(path: str, number: int) -> str:
    return _segment_path(f"layers/omitted/{path.removeprefix('layers/')}", number)


def _kept(path: str, mask: SegmentMasks) -> Int[Array, "L *K kept"] | None:
    """The indices along the neuron axis of this parameter; None: it is kept whole.

    Indices with three axes are query heads within a group: keys and values then stay whole.
    """
    leaf = _leaf(path)
    if leaf in _CHANNEL_LEAVES:
        return mask.channels
    if mask.heads is None or leaf in _HEAD_LEAVES:
        return mask.heads if leaf in _HEAD_LEAVES else None
    return mask.heads if leaf in _GROUP_LEAVES and mask.heads.ndim == 2 else None


_PROMISES: dict[str, Any] = {
    "unique_indices": True,
    "indices_are_sorted": True,
    "mode": "promise_in_bounds",
}


def _with_kept(
    cut: Mapping[str, Array], masks: Masks
) -> Iterator[tuple[str, Array, Int[Array, "L *K kept"] | None]]:
    """Every entry of a tree cut into segments, with the kept indices as `_kept` gives them."""
    for path, value in cut.items():
        told = masks[int(path.split("/")[1])] if path.startswith("layers/") else None
        yield path, value, None if told is None else _kept(path, told)


def _take(value: Array, kept: Int[Array, "L *K kept"], balance: int = 1) -> Array:
    """The kept rows along the neuron axis."""
    rows = _in_parts(value, kept.ndim, balance)
    return _rows_at(rows, _local(kept, rows.shape[2], balance), kept.ndim, **_PROMISES)


def _take_others(value: Array, kept: Int[Array, "L *K kept"], balance: int) -> Array:
    """The other rows, sorted: as many of each part as are omitted there."""
    rows = _in_parts(value, kept.ndim, balance)
    places = others(_local(kept, rows.shape[2], balance), rows.shape[2])
    return _rows_at(rows, places, kept.ndim, **_PROMISES)


def _merge(kept: Array, omitted: Array, indices: Int[Array, "L *K kept"], balance: int) -> Array:
    """What `_take` and `_take_others` have taken, together and in order again."""
    axes = indices.ndim
    here, there = _in_parts(kept, axes, balance), _in_parts(omitted, axes, balance)
    if not here.shape[2]:
        return omitted
    if not there.shape[2]:
        return kept
    total = here.shape[2] + there.shape[2]
    is_kept = _is_kept(_local(indices, total, balance), total)

    def spread(rows: Array, kind: Array) -> Array:
        # The n-th neuron of its kind has the n-th row; where the other kind is, any row will do.
        rank = jnp.maximum(jnp.cumsum(kind, axis=-1) - 1, 0)
        return _rows_at(rows, rank, axes, mode="promise_in_bounds")

    here, there = spread(here, is_kept), spread(there, ~is_kept)
    is_kept = is_kept.reshape(here.shape[:axes])
    return jnp.where(jnp.expand_dims(is_kept, range(axes, here.ndim)), here, there)


def _in_parts(value: Array, axes: int, balance: int) -> Array:
    """`[L, parts, rows, ...]` of `[L, neurons, ...]`, and of query heads, `axes` being 3, of
    `[L, KV groups, heads, ...]`, as they are: these are indexed within their group already.

    Groups and channels are selected evenly in `balance` parts; with indices local to each part
    gathers are batched over parts, so that on a mesh whose `tensor` axis divides `balance` nothing
    leaves its device.
    """
    if axes == 3:
        return value
    return value.reshape(len(value), balance, value.shape[1] // balance, *value.shape[2:])


def _local(
    kept: Int[Array, "L *K kept"], size: int, balance: int
) -> Int[Array, "L parts kept_of_each"]:
    """Kept indices within their part of `size` neurons."""
    if kept.ndim == 3:
        return kept
    starts = jnp.arange(balance, dtype=kept.dtype)[None, :, None] * size
    return _in_parts(kept, kept.ndim, balance) - starts


def others(kept: Int[Array, "*parts kept"], size: int) -> Int[Array, "*parts omitted"]:
    """The indices below `size` that are not kept, sorted."""
    omitted = size - kept.shape[-1]
    indices: Array = jnp.argsort(_is_kept(kept, size), axis=-1, stable=True)[..., :omitted]
    return indices.astype(kept.dtype)  # False comes first


def _is_kept(kept: Int[Array, "*parts kept"], size: int) -> Bool[Array, "*parts {size}"]:
    nothing = jnp.zeros((*kept.shape[:-1], size), bool)
    return jnp.put_along_axis(nothing, kept, True, axis=-1, inplace=False)


def _rows_at(rows: Array, places: Int[Array, "L parts n"], axes: int, **promises: Any) -> Array:
    """Rows at these places of each part; of groups and channels the parts side by side again."""
    taken = jax.vmap(jax.vmap(lambda w, i: w.at[i].get(**promises)))(rows, places)
    return taken if axes == 3 else taken.reshape(len(rows), -1, *rows.shape[3:])
