"""Documents into rows of one length.

A document of n + 1 tokens teaches n (input, target) pairs. One with more pairs than a row has slots
is cut into row-sized pieces; a shorter one is never cut. Every piece is a segment of its own.

Grain's packers look at a window of rows and give up the whole window at the first piece that fits
nowhere. The lengths of a whole corpus fit in memory, so that exact best-fit over all of them, the
longest first, is both shorter and tighter.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Int


class Pieces(NamedTuple):
    """Runs of pairs: piece p reads tokens starts[p] to starts[p] + lengths[p], the last one as a
    target only.
    """

    starts: Int[np.ndarray, " pieces"]
    lengths: Int[np.ndarray, " pieces"]  # in pairs, 1 to row_length


def cut(
    starts: Int[np.ndarray, " documents"], sizes: Int[np.ndarray, " documents"], row_length: int
) -> Pieces:
    """The pieces of documents that begin at `starts` and have `sizes` tokens.

    A document of one token has no pair and no piece.
    """
    pairs = np.maximum(sizes - 1, 0)
    pieces = -(-pairs // row_length)
    first = np.cumsum(pieces) - pieces
    offsets = (np.arange(pieces.sum()) - np.repeat(first, pieces)) * row_length
    lengths = np.minimum(np.repeat(pairs, pieces) - offsets, row_length)
    return Pieces(np.repeat(starts, pieces) + offsets, lengths)


def assign_rows(lengths: Int[np.ndarray, " pieces"], row_length: int) -> Int[np.ndarray, " pieces"]:
    """The row of each piece, by best-fit decreasing; equal lengths in their order. Rows from 0.

    Each piece goes where it leaves the least room, into a new row where it fits in none.
    """
    rows = np.empty(len(lengths), np.int64)
    open_rows: list[list[int]] = [[] for _ in range(row_length + 1)]  # by the room they have left
    rooms = 0  # bit r is set where open_rows[r] has a row: the tightest fit is one bit operation
    count = 0
    for piece in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[piece])
        fitting = rooms >> length
        if fitting:
            room = (fitting & -fitting).bit_length() - 1 + length
            row = open_rows[room].pop()
            if not open_rows[room]:
                rooms ^= 1 << room
        else:
            room, row = row_length, count
            count += 1
        rows[piece] = row
        left = room - length
        if left:
            open_rows[left].append(row)
            rooms |= 1 << left
    return rows
