"""Sparsity patterns: kept blocks of rows, or a mask of square blocks.

Both are pytrees of int32 arrays with static block size and counts. One compiled program therefore
serves every selection of the same size.
"""

import dataclasses
import functools
from typing import Any, ClassVar, Literal, Self

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

Kind = Literal["rows", "mask"]  # of a pattern; each has its own tuning entries


@functools.partial(jax.tree_util.register_dataclass, data_fields=["ids"], meta_fields=["block"])
@dataclasses.dataclass(frozen=True)
class KeptRows:
    """Kept blocks of rows of a matrix `[F, D]`: rows `[id · block, (id + 1) · block)` of each id.

    `ids` are sorted and unique. Arrays `[T, kept]` have one column per kept row, in that order.
    """

    ids: Int[Array, " k"]
    block: int
    kind: ClassVar[Kind] = "rows"

    @property
    def kept(self) -> int:
        """Number of kept rows of the matrix."""
        return self.ids.shape[-1] * self.block


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["result", "reduction", "slot", "valid"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class BlockOrder:
    """The order in which a product visits the stored blocks; entries of one result are adjacent.

    `result` and `reduction`: tile indices in the result and in the other operand. `slot`: index of
    the stored block. `valid`: 0 for the padding entry of a result without blocks, which is written
    as zeros.
    """

    result: Int[Array, " n"]
    reduction: Int[Array, " n"]
    slot: Int[Array, " n"]
    valid: Int[Array, " n"]


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["reduction", "slot"], meta_fields=[]
)
@dataclasses.dataclass(frozen=True)
class BlockLists:
    """The stored blocks of each block row (or block column), padded to the longest list.

    `reduction`: tile index in the other operand, 0 in padding. `slot`: index of the stored block,
    the number of stored blocks in padding. The padded length k is part of the shape, hence static.
    """

    reduction: Int[Array, "R k"]
    slot: Int[Array, "R k"]


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["rows", "columns", "by_row", "by_column", "row_lists", "column_lists"],
    meta_fields=["shape", "block"],
)
@dataclasses.dataclass(frozen=True)
class BlockMask:
    """Mask of square blocks of a matrix `[R · block, C · block]`.

    The values are `[nonzero, block, block]` in row-major order; block n is at block row `rows[n]`
    and block column `columns[n]`. Products x · Wᵀ visit the blocks in the order `by_row`, products
    x · W in the order `by_column`. `row_lists` and `column_lists` hold the same, padded.
    """

    rows: Int[Array, " nonzero"]
    columns: Int[Array, " nonzero"]
    by_row: BlockOrder
    by_column: BlockOrder
    row_lists: BlockLists
    column_lists: BlockLists
    shape: tuple[int, int]
    block: int
    kind: ClassVar[Kind] = "mask"

    @classmethod
    def of(cls, kept: Bool[np.ndarray, "*L R C"], block: int) -> Self:
        """Return the mask of a concrete 0/1 array with one entry per block.

        Axes L in front, of layers that keep equally many blocks, are in front of all arrays.
        """
        kept = np.asarray(kept)
        if kept.ndim < 2 or not kept.size:
            raise ValueError(f"kept: shape {kept.shape}, expected [block rows, block columns]")
        if not np.isin(kept, (0, 1)).all():
            raise ValueError("kept: other values than 0 and 1")
        _check_block(block)
        *layers, height, width = kept.shape
        counts = np.unique(kept.sum(axis=(-2, -1), dtype=int))
        if len(counts) > 1:
            raise ValueError(f"layers keep {counts.tolist()} blocks, expected one number for all")
        places = [np.nonzero(layer) for layer in kept.reshape(-1, height, width)]
        rows, columns = np.stack(places, axis=1)
        mask = cls(
            rows=jnp.asarray(rows),
            columns=jnp.asarray(columns),
            by_row=_block_order(rows, columns, height),
            by_column=_block_order(columns, rows, width),
            row_lists=_block_lists(rows, columns, height),
            column_lists=_block_lists(columns, rows, width),
            shape=(height, width),
            block=block,
        )
        return jax.tree.map(
            lambda array: array.reshape(*layers, *array.shape[1:]).astype(jnp.int32), mask
        )

    @classmethod
    def balanced(
        cls, columns: Int[Array, "R k"], width: int, block: int, longest: int | None = None
    ) -> Self:
        """Return the mask whose block row r has its k blocks at the sorted `columns[r]`, which may
        be traced, of C = `width` block columns.

        `longest`: the most blocks in one block column, a static limit that the columns must obey;
        None: R. Entries for empty block columns are part of every such mask, so that all masks of
        the same k and `longest` have the same shapes.
        """
        _check_block(block)
        height, per_row = columns.shape
        nonzero = height * per_row
        rows = jnp.repeat(jnp.arange(height, dtype=jnp.int32), per_row, total_repeat_length=nonzero)
        flat = columns.reshape(-1).astype(jnp.int32)
        slots = jnp.arange(nonzero, dtype=jnp.int32)
        order = jnp.argsort(flat, stable=True).astype(jnp.int32)
        sorted_columns = flat[order]
        starts = jnp.searchsorted(sorted_columns, jnp.arange(width, dtype=jnp.int32))
        place = (sorted_columns, slots - starts[sorted_columns])
        lists = jnp.zeros((width, height if longest is None else longest), jnp.int32)
        return cls(
            rows=rows,
            columns=flat,
            by_row=BlockOrder(rows, flat, slots, jnp.ones_like(slots)),
            by_column=_with_padding(sorted_columns, rows[order], order, width),
            row_lists=BlockLists(columns.astype(jnp.int32), slots.reshape(columns.shape)),
            column_lists=BlockLists(
                lists.at[place].set(rows[order], mode="drop"),
                (lists + nonzero).at[place].set(order, mode="drop"),
            ),
            shape=(height, width),
            block=block,
        )

    @property
    def nonzero(self) -> int:
        """Number of stored blocks."""
        return self.rows.shape[-1]


Pattern = KeptRows | BlockMask


def kept_rows(ids: Int[Array, " k"], block: int) -> KeptRows:
    """Return a pattern of kept blocks of rows; `ids` must be sorted and unique (`check_ids`)."""
    ids = as_array("ids", ids)
    ids = ids if ids.size else ids.astype(jnp.int32)
    if ids.ndim != 1 or not jnp.issubdtype(ids.dtype, jnp.integer):
        raise ValueError(f"ids: {ids.dtype}{list(ids.shape)}, expected a list of integers")
    _check_block(block)
    return KeptRows(ids.astype(jnp.int32), block)


def as_array(name: str, value: Any) -> Array:
    """Convert an argument to an array; raises a `TypeError` that names the argument."""
    try:
        return jnp.asarray(value)
    except (TypeError, ValueError):
        kind = type(value).__name__
        raise TypeError(f"{name}: {kind}, expected an array") from None


def check_ids(pattern: KeptRows, blocks: int) -> None:
    """Check under `jax_enable_checks` that ids, traced or not, are sorted, unique and in range.

    They are not checked otherwise, since reading them would block on the device.
    """
    if jax.config.values["jax_enable_checks"]:
        check = functools.partial(_check_ids, blocks)
        if isinstance(pattern.ids, jax.core.Tracer):
            jax.debug.callback(check, pattern.ids)
        else:
            check(np.asarray(pattern.ids))


def _check_block(block: int) -> None:
    if not isinstance(block, int) or block < 8 or block % 8:
        raise ValueError(f"block: {block!r}, expected an int, a multiple of 8")


def _check_ids(blocks: int, ids: Int[np.ndarray, " k"]) -> None:
    if len(ids) and (ids[0] < 0 or ids[-1] >= blocks or (np.diff(ids) <= 0).any()):
        raise ValueError(f"ids: {ids.tolist()}, expected sorted, unique, from 0 to {blocks - 1}")


def _block_order(
    result: Int[np.ndarray, "L nonzero"], reduction: Int[np.ndarray, "L nonzero"], results: int
) -> BlockOrder:
    """Sort the entries by result, and add a padding entry for each result without blocks. Layers
    with fewer of these have the others at the last result."""
    empty = [np.setdiff1d(np.arange(results), layer) for layer in result]
    most = max(map(len, empty))
    padding = np.stack([np.append(e, np.full(most - len(e), results - 1)) for e in empty])
    zeros, valid = np.zeros_like(padding), np.ones_like(result)
    slot = np.broadcast_to(np.arange(result.shape[1]), result.shape)
    fields = [
        np.concatenate(parts, axis=1)
        for parts in ((result, padding), (reduction, zeros), (slot, zeros), (valid, zeros))
    ]
    order = np.argsort(fields[0], axis=1, kind="stable")
    return BlockOrder(*(jnp.asarray(np.take_along_axis(f, order, axis=1)) for f in fields))


def _with_padding(result: Array, reduction: Array, slot: Array, results: int) -> BlockOrder:
    """Return entries that are sorted by result, with a padding entry for each result."""
    every, zeros = jnp.arange(results, dtype=jnp.int32), jnp.zeros(results, jnp.int32)
    fields = [
        jnp.concatenate(parts)
        for parts in (
            (result, every),
            (reduction, zeros),
            (slot, zeros),
            (jnp.ones_like(result), zeros),
        )
    ]
    order = jnp.argsort(fields[0], stable=True)
    return BlockOrder(*(field[order] for field in fields))


def _block_lists(
    result: Int[np.ndarray, "L nonzero"], reduction: Int[np.ndarray, "L nonzero"], results: int
) -> BlockLists:
    """Return a list for each result, in the order of the slots."""
    nonzero = result.shape[1]
    counts = (result[:, None] == np.arange(results)[:, None]).sum(axis=-1)
    order = np.argsort(result, axis=1, kind="stable")
    stored = np.arange(counts.max()) < counts[..., None]
    reductions, slots = np.zeros(stored.shape, int), np.full(stored.shape, nonzero)
    reductions[stored] = np.take_along_axis(reduction, order, axis=1).ravel()
    slots[stored] = order.ravel()
    return BlockLists(jnp.asarray(reductions), jnp.asarray(slots))
