"""Where neurons live in the parameters, and moving between the whole model and what is kept of it.

Between two refreshes the kept neurons form a smaller dense model. `compact` gathers it out of a
whole tree (parameters, moments or update counts: anything keyed by parameter path), `expand` writes
it back, bit for bit. A whole tree stacks all layers (`layers/mlp/gate`), a compact one numbers its
segments (`layers/0/mlp/gate`). What no segment gathers is moved, not copied. In a segment with
dense tokens the omitted channels are a second, smaller MLP (`layers/0/omitted/gate`).
"""

from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from sat_jax.sparsity.masks import Masks, SegmentMasks
from sat_jax.sparsity.plan import Plan, Segment

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
    """(compact tree, resting tree). The resting tree holds, whole, what was gathered from: what is
    omitted stays there until `expand`."""
    small: dict[str, Array] = {}
    resting: dict[str, Array] = {}
    for path, value in whole.items():
        if not path.startswith("layers/"):
            small[path] = value
            continue
        kept = [_kept(path, mask) for mask in masks]
        for number, (segment, indices) in enumerate(zip(plan.segments, kept, strict=True)):
            part = value if len(masks) == 1 else value[segment.start : segment.stop]
            if indices is not None:
                if _splits(path, segment):
                    others = _others(indices, value.shape[1])
                    small[_omitted_path(path, number)] = _take(part, others, plan.balance)
                part = _take(part, indices, plan.balance)
            small[_segment_path(path, number)] = part
        if any(indices is not None for indices in kept):
            resting[path] = value
    return small, resting


def expand(
    small: Mapping[str, Array], resting: Mapping[str, Array], masks: Masks, plan: Plan
) -> dict[str, Array]:
    """The whole tree: the inverse of `compact`, with the compact tree's values written back."""
    whole: dict[str, Array] = {}
    for path, value in small.items():
        if not path.startswith("layers/"):
            whole[path] = value
        elif path.startswith("layers/0/") and not path.startswith("layers/0/omitted/"):
            name = f"layers/{path.removeprefix('layers/0/')}"
            parts = [small[_segment_path(name, number)] for number in range(len(masks))]
            whole[name] = (
                _write_back(name, small, resting[name], masks, plan)
                if name in resting
                else parts[0]
                if len(parts) == 1
                else jnp.concatenate(parts)
            )
    return whole


def _write_back(
    path: str, small: Mapping[str, Array], whole: Array, masks: Masks, plan: Plan
) -> Array:
    """`whole` with every segment's part in its place.

    What was gathered is written last and straight into `whole`: so XLA does it in place, where a
    slice of `whole` or a later update would be one more copy of it.
    """
    kept = [_kept(path, mask) for mask in masks]
    for number in sorted(range(len(masks)), key=lambda number: kept[number] is not None):
        segment, indices = plan.segments[number], kept[number]
        part = small[_segment_path(path, number)]
        if indices is None:
            whole = jax.lax.dynamic_update_slice_in_dim(whole, part, segment.start, axis=0)
            continue
        if _splits(path, segment):
            others = _others(indices, whole.shape[1])
            omitted = small[_omitted_path(path, number)]
            whole = _put(whole, omitted, others, segment.start, plan.balance)
        whole = _put(whole, part, indices, segment.start, plan.balance)
    return whole


def _splits(path: str, segment: Segment) -> bool:
    """Whether what is omitted of this parameter is trained as well."""
    return segment.dense_tokens > 0 and _leaf(path) in _CHANNEL_LEAVES


def _others(kept: Int[Array, "L kept"], total: int) -> Int[Array, "L omitted"]:
    """The indices that are not kept, sorted. As many of each of the plan's parts as are omitted."""
    keep = jnp.zeros((len(kept), total), bool)
    keep = jnp.put_along_axis(keep, kept, True, axis=1, inplace=False)
    # False first, in their order.
    return jnp.argsort(keep, axis=1, stable=True)[:, : total - kept.shape[1]].astype(kept.dtype)


def mask_values(masks: Masks) -> dict[str, Array]:
    """The masks by the paths of the modules' `Mask` variables."""
    values: dict[str, Array] = {}
    for number, mask in enumerate(masks):
        if mask.heads is not None:
            values[f"layers/{number}/attention/kept_heads"] = mask.heads
        if mask.channels is not None:
            values[f"layers/{number}/mlp/kept_channels"] = mask.channels
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
    indices = kept[layer]
    groups = jnp.ogrid[tuple(slice(size) for size in indices.shape)][:-1]
    return layer, *groups, indices


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
    return f"layers/{number}/omitted/{_leaf(path)}"


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


def _take(value: Array, indices: Int[Array, "L *K kept"], balance: int = 1) -> Array:
    """The kept rows along the neuron axis."""
    rows, local = _in_parts(value, indices, balance)
    taken = jax.vmap(jax.vmap(lambda w, i: w.at[i].get(**_PROMISES)))(rows, local)
    return taken.reshape(*indices.shape, *value.shape[indices.ndim :])


def _put(
    whole: Array, kept: Array, indices: Int[Array, "L *K kept"], start: int, balance: int
) -> Array:
    """`whole` with the kept rows of the layers from `start` on replaced."""
    rows, local = _in_parts(whole, indices, balance)
    layer = jax.lax.broadcasted_iota(local.dtype, local.shape, 0) + start
    put = jax.lax.scatter(
        rows,
        jnp.stack([layer, local], axis=-1),
        kept.reshape(*local.shape, *rows.shape[3:]),
        jax.lax.ScatterDimensionNumbers(
            update_window_dims=tuple(range(3, rows.ndim)),
            inserted_window_dims=(0, 2),
            scatter_dims_to_operand_dims=(0, 2),
            operand_batching_dims=(1,),
            scatter_indices_batching_dims=(1,),
        ),
        **_PROMISES,
    )
    return put.reshape(whole.shape)


def _in_parts(
    value: Array, indices: Int[Array, "L *K kept"], balance: int
) -> tuple[Array, Int[Array, "L P kept"]]:
    """Rows `[L, parts, rows, ...]` and indices `[L, parts, kept]` local to each part; `value` may
    have more layers than `indices`.

    Query heads are indexed within their KV group already. Groups and channels are selected evenly
    in `balance` parts; with local indices gather and scatter are batched over parts, so that on a
    mesh whose `tensor` axis divides `balance` nothing leaves its device.
    """
    if indices.ndim == 3:
        return value, indices
    size = value.shape[1] // balance
    local = indices.reshape(len(indices), balance, indices.shape[1] // balance)
    offsets = jnp.arange(balance, dtype=indices.dtype) * size
    rows = value.reshape(len(value), balance, size, *value.shape[2:])
    return rows, local - offsets[None, :, None]
