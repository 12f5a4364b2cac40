"""Packing of token sequences into batches of one shape, so that an evaluation compiles once."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from sat_jax.data.batch import Batch
from sat_jax.data.batches import EMPTY_ROW, Row, unpack
from sat_jax.data.packing import assign_rows

_ROUND = 64  # row lengths are multiples of this, so that few lengths are compiled


class PackedBatch(NamedTuple):
    """A batch, and the sequence numbers of each row: segment s is the s-th of them."""

    batch: Batch
    sequences: list[Int[np.ndarray, " sequences"]]


def row_width(longest: int, limit: int) -> int:
    """Return the number of slots for a sequence of `longest` pairs, rounded up to at most `limit`.

    `limit` must be at least `longest`.
    """
    return min(limit, -(-longest // _ROUND) * _ROUND)


def pack(
    sequences: Sequence[Sequence[int]], context: Sequence[int], width: int, rows: int
) -> Iterator[PackedBatch]:
    """Yield batches of `rows` × `width` that contain every sequence once, as a segment.

    A sequence of n + 1 tokens fills n slots, at most `width`; its first `context` slots have no
    loss. A sequence of one token has no slot and is in no batch.
    """
    lengths = np.array([len(sequence) - 1 for sequence in sequences], np.int64)
    nonempty = np.flatnonzero(lengths > 0)
    row_of_sequence = assign_rows(lengths[nonempty], width)
    order = np.argsort(row_of_sequence, kind="stable")
    ends = np.flatnonzero(np.diff(row_of_sequence[order])) + 1
    members = np.split(nonempty[order], ends) if len(nonempty) else []
    for start in range(0, len(members), rows):
        batch_members = members[start : start + rows]
        batch = _batch(batch_members, sequences, context, lengths, width, rows)
        yield PackedBatch(batch, batch_members)


def _batch(
    members: Sequence[np.ndarray],
    sequences: Sequence[Sequence[int]],
    context: Sequence[int],
    lengths: np.ndarray,
    width: int,
    rows: int,
) -> Batch:
    stored = [
        Row(
            np.concatenate([sequences[number] for number in row]).astype(np.int32),
            lengths[row].astype(np.int32),
        )
        for row in members
    ]
    batch = unpack(stored + [EMPTY_ROW] * (rows - len(stored)), width)
    context_slots = np.zeros((rows, 1 + max(len(row) for row in members)), np.int32)
    for index, row in enumerate(members):
        context_slots[index, 1 : 1 + len(row)] = [context[number] for number in row]
    has_loss = batch.positions >= np.take_along_axis(context_slots, batch.segment_ids, axis=1)
    return batch._replace(loss_mask=batch.loss_mask & has_loss)
