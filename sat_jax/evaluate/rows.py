"""Pieces of tokens into batches of one shape, so that a whole evaluation compiles once."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from sat_jax.data.batch import Batch
from sat_jax.data.batches import BLANK, Row, unpack
from sat_jax.data.packing import assign_rows

_ROUND = 64  # rows shorter than they may be are a multiple: not every text compiles anew


class Packed(NamedTuple):
    """A batch, and for each of its rows the numbers of the pieces in it: segment s is the s-th."""

    batch: Batch
    pieces: list[Int[np.ndarray, " pieces"]]


def row_width(longest: int, most: int) -> int:
    """Slots of a row that has room for a piece of `longest` pairs: rounded up, but not over `most`.

    `most` is `longest` or more.
    """
    return min(most, -(-longest // _ROUND) * _ROUND)


def pack(
    pieces: Sequence[Sequence[int]], known: Sequence[int], width: int, rows: int
) -> Iterator[Packed]:
    """Batches of `rows` × `width` that have every piece once, as a segment of its own.

    A piece of n + 1 tokens fills n slots, `width` at most; `loss_mask` leaves out the first
    `known` of them. A piece of one token has no slot and is in no batch.
    """
    lengths = np.array([len(piece) - 1 for piece in pieces], np.int64)
    filled = np.flatnonzero(lengths > 0)
    of_row = assign_rows(lengths[filled], width)
    order = np.argsort(of_row, kind="stable")
    ends = np.flatnonzero(np.diff(of_row[order])) + 1
    members = np.split(filled[order], ends) if len(filled) else []
    for start in range(0, len(members), rows):
        of_batch = members[start : start + rows]
        yield Packed(_batch(of_batch, pieces, known, lengths, width, rows), of_batch)


def _batch(
    members: Sequence[np.ndarray],
    pieces: Sequence[Sequence[int]],
    known: Sequence[int],
    lengths: np.ndarray,
    width: int,
    rows: int,
) -> Batch:
    stored = [
        Row(
            np.concatenate([pieces[piece] for piece in row]).astype(np.int32),
            lengths[row].astype(np.int32),
        )
        for row in members
    ]
    batch = unpack(stored + [BLANK] * (rows - len(stored)), width)
    skipped = np.zeros((rows, 1 + max(len(row) for row in members)), np.int32)
    for index, row in enumerate(members):
        skipped[index, 1 : 1 + len(row)] = [known[piece] for piece in row]
    new = batch.positions >= np.take_along_axis(skipped, batch.segment_ids, axis=1)
    return batch._replace(loss_mask=batch.loss_mask & new)
