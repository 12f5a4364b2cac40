"""Packing of documents into rows of one length.

A document of n + 1 tokens has n pairs of input and target. A document with more pairs than a row
has slots is split into row-sized pieces; a shorter one is never split. Every piece is a segment.

Grain's packers consider a window of rows, and close the whole window when a piece fits into none of
its rows. The lengths of a whole corpus fit in memory, so that exact best-fit decreasing over all of
them is possible. It is less code and leaves less padding.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int


class Pieces(NamedTuple):
    """Runs of pairs: piece p has the tokens starts[p] to starts[p] + lengths[p], both included."""

    starts: Int[np.ndarray, " pieces"]
    lengths: Int[np.ndarray, " pieces"]  # in pairs, 1 to row_length


def split_into_pieces(
    starts: Int[np.ndarray, " documents"], sizes: Int[np.ndarray, " documents"], row_length: int
) -> Pieces:
    """Return the pieces of documents that begin at `starts` and have `sizes` tokens.

    A document of one token has no pair and no piece.
    """
    pairs = np.maximum(sizes - 1, 0)
    pieces = -(-pairs // row_length)
    first = np.cumsum(pieces) - pieces
    offsets = (np.arange(pieces.sum()) - np.repeat(first, pieces)) * row_length
    lengths = np.minimum(np.repeat(pairs, pieces) - offsets, row_length)
    return Pieces(np.repeat(starts, pieces) + offsets, lengths)


def longest_share(
    lengths: Int[np.ndarray, " pieces"], rows: Sequence[Int[np.ndarray, " pieces"]]
) -> float:
    """Return the share of a row's tokens that belong to its longest document, the mean over rows.
    No row has two pieces of one document."""
    return float(np.mean([lengths[row].max() / lengths[row].sum() for row in rows]))


def assign_rows(
    lengths: Int[np.ndarray, " pieces"], row_length: int
) -> list[Int[np.ndarray, " pieces"]]:
    """Return the numbers of the pieces in each row, by best-fit decreasing.

    A piece is placed in the row where it leaves the fewest free slots, or in a new row if it fits
    into none.
    """
    rows = np.empty(len(lengths), np.int64)
    rows_by_free: list[list[int]] = [[] for _ in range(row_length + 1)]
    # Bit n is set if a row has n free slots, so that the best fit is one bit operation.
    free_sizes = 0
    count = 0
    for piece in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[piece])
        fitting = free_sizes >> length
        if fitting:
            free = (fitting & -fitting).bit_length() - 1 + length
            row = rows_by_free[free].pop()
            if not rows_by_free[free]:
                free_sizes ^= 1 << free
        else:
            free, row = row_length, count
            count += 1
        rows[piece] = row
        remaining = free - length
        if remaining:
            rows_by_free[remaining].append(row)
            free_sizes |= 1 << remaining
    order = np.argsort(rows, kind="stable")
    return np.split(order, np.flatnonzero(np.diff(rows[order])) + 1) if count else []
