"""Packing of token sequences into batches of one shape, so that an evaluation compiles once."""

from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Int

from sat_jax.data.batch import Batch
from sat_jax.data.batches import EMPTY_ROW, Row, unpack
from sat_jax.data.packing import assign_rows

_ROUND = 64  # row lengths are multiples of this, so that few lengths are compiled


def row_width(longest: int, limit: int) -> int:
    """Return the slots for a sequence of `longest` pairs, rounded up to `limit` ≥ `longest`."""
    return min(limit, -(-longest // _ROUND) * _ROUND)


def pack(
    sequences: Sequence[Sequence[int]], context: Sequence[int], width: int, rows: int
) -> Iterator[tuple[Batch, list[Int[np.ndarray, " sequences"]]]]:
    """Yield batches of `rows` × `width` that contain every sequence once, as a segment.

    Each batch comes with the sequence numbers of its rows: segment s is the s-th of them. A
    sequence of n + 1 tokens fills n slots, at most `width`; its first `context` slots have no loss.
    A sequence of one token has no slot and is in no batch.
    """
    lengths = np.array([len(sequence) - 1 for sequence in sequences], np.int64)
    nonempty = np.flatnonzero(lengths > 0)
    members = [nonempty[row] for row in assign_rows(lengths[nonempty], width)]
    stored = []
    for row in members:
        ends = np.cumsum(lengths[row])
        spans = np.stack([ends - lengths[row] + np.asarray(context)[row], ends], axis=1)
        tokens = np.concatenate([sequences[number] for number in row]).astype(np.int32)
        stored.append(Row(tokens, lengths[row], spans.reshape(-1)))
    for start in range(0, len(members), rows):
        part = stored[start : start + rows]
        batch = unpack(part + [EMPTY_ROW] * (rows - len(part)), width)
        yield batch, members[start : start + rows]
