"""Which blocks of a matrix take part: whole rows of blocks, or any pattern.

Both are pytrees of int32 arrays, so that one compiled program serves every selection of the same
size; block size and counts are static.
"""

import dataclasses
import functools
from typing import Any, ClassVar, Literal, Self

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

Kind = Literal["rows", "mask"]  # of a pattern: what is measured apart


@functools.partial(jax.tree_util.register_dataclass, data_fields=["ids"], meta_fields=["block"])
@dataclasses.dataclass(frozen=True)
class KeptRows:
    """Whole runs of `block` rows of a matrix `[F, D]`: rows `[id · block, (id + 1) · block)`.

    `ids` are sorted and unique; the kept rows of the matrix, in that order, are the neurons that
    `[T, kept]` arrays hold.
    """

    ids: Int[Array, " k"]
    block: int
    kind: ClassVar[Kind] = "rows"

    @property
    def kept(self) -> int:
        """Kept rows of the matrix."""
        return self.ids.shape[-1] * self.block


# A walk's entry (one product of two tiles) → which tile of the result, of the other factor, and
# which stored block. Entries of one result follow each other; an entry that is not live adds
# nothing, and makes an empty result be written.
@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["result", "factor", "slot", "live"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class Walk:
    result: Int[Array, " n"]
    factor: Int[Array, " n"]
    slot: Int[Array, " n"]
    live: Int[Array, " n"]


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["rows", "columns", "by_row", "by_column"],
    meta_fields=["shape", "block"],
)
@dataclasses.dataclass(frozen=True)
class BlockMask:
    """Any pattern of square blocks of a matrix `[R · block, C · block]`.

    Its values are `[nonzero, block, block]`, block n standing at block row `rows[n]` and block
    column `columns[n]`, rows first. `by_row` and `by_column` are the two orders in which a product
    with the matrix and one with its transpose walk over them.
    """

    rows: Int[Array, " nonzero"]
    columns: Int[Array, " nonzero"]
    by_row: Walk
    by_column: Walk
    shape: tuple[int, int]
    block: int
    kind: ClassVar[Kind] = "mask"

    @classmethod
    def of(cls, kept: Bool[np.ndarray, "R C"], block: int) -> Self:
        """The pattern of a concrete 0/1 matrix, one entry a block."""
        kept = np.asarray(kept)
        if kept.ndim != 2 or not kept.size:
            raise ValueError(f"kept: shape {kept.shape}, expected [block rows, block columns]")
        if not np.isin(kept, (0, 1)).all():
            raise ValueError("kept: other values than 0 and 1")
        _check_block(block)
        rows, columns = np.nonzero(kept)
        slots = np.arange(len(rows))
        return cls(
            rows=jnp.asarray(rows, jnp.int32),
            columns=jnp.asarray(columns, jnp.int32),
            by_row=_walk(rows, columns, slots, kept.shape[0]),
            by_column=_walk(columns, rows, slots, kept.shape[1]),
            shape=(kept.shape[0], kept.shape[1]),
            block=block,
        )

    @property
    def nonzero(self) -> int:
        """Stored blocks."""
        return self.rows.shape[-1]


Pattern = KeptRows | BlockMask


def kept_rows(ids: Int[Array, " k"], block: int) -> KeptRows:
    """Rows of blocks by their ids, which are sorted and unique: see `check_ids`."""
    ids = as_array("ids", ids)
    ids = ids if ids.size else ids.astype(jnp.int32)
    if ids.ndim != 1 or not jnp.issubdtype(ids.dtype, jnp.integer):
        raise ValueError(f"ids: {ids.dtype}{list(ids.shape)}, expected a list of integers")
    _check_block(block)
    return KeptRows(ids.astype(jnp.int32), block)


def as_array(name: str, value: Any) -> Array:
    """Of what is one, or a list; raises `TypeError` that names the argument for what is none."""
    try:
        return jnp.asarray(value)
    except (TypeError, ValueError):
        kind = type(value).__name__
        raise TypeError(f"{name}: {kind}, expected an array") from None


def check_ids(pattern: KeptRows, blocks: int) -> None:
    """Under `jax_enable_checks`: the ids are sorted, unique and of `blocks` blocks, traced or not.

    Without it nobody looks, as that would wait for the device.
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


def _walk(result: np.ndarray, factor: np.ndarray, slot: np.ndarray, results: int) -> Walk:
    """Entries in the order of their results, with an idle one for each result that has none."""
    empty = np.setdiff1d(np.arange(results), result)
    live = np.concatenate([np.ones_like(result), np.zeros_like(empty)])
    nowhere = np.zeros_like(empty)
    columns = [np.concatenate([result, empty])]
    columns += [np.concatenate([part, nowhere]) for part in (factor, slot)]
    order = np.argsort(columns[0], kind="stable")
    return Walk(*(jnp.asarray(part[order], jnp.int32) for part in (*columns, live)))
