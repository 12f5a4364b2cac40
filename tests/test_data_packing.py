"""Packing: every input-target pair occurs once, and rows are packed tightly."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from sat_jax.data.batch import Batch
from sat_jax.data.batches import EMPTY_ROW, Row, unpack
from sat_jax.data.packing import assign_rows, longest_share, split_into_pieces

documents_strategy = st.lists(st.integers(0, 30), min_size=1, max_size=40)
length_strategy = st.integers(1, 12)


def pack(sizes: list[int], row_length: int) -> tuple[Batch, np.ndarray]:
    """Pack documents of these sizes, with distinct tokens, into the rows of one batch."""
    sizes_array = np.array(sizes)
    starts = np.cumsum(sizes_array) - sizes_array
    flat = np.arange(1, sizes_array.sum() + 1, dtype=np.int32)
    pieces = split_into_pieces(starts, sizes_array, row_length)
    stored = []
    for members in assign_rows(pieces.lengths, row_length):
        runs = [flat[pieces.starts[p] : pieces.starts[p] + pieces.lengths[p] + 1] for p in members]
        stored.append(Row(np.concatenate(runs), pieces.lengths[members]))
    return unpack(stored or [EMPTY_ROW], row_length), flat


@given(documents_strategy, length_strategy)
@example([1], 1)
@example([13, 2, 1, 0, 24, 12], 12)
def test_every_pair_of_every_document_occurs_once(sizes: list[int], row_length: int) -> None:
    batch, flat = pack(sizes, row_length)
    ends = np.cumsum(sizes)
    expected = [
        pair
        for end, size in zip(ends, sizes, strict=True)
        for pair in pairwise(flat[end - size : end])
    ]
    mask = batch.loss_mask
    pairs = list(zip(batch.tokens[mask], batch.targets[mask], strict=True))
    assert sorted(pairs) == expected  # tokens are numbered in the order of the documents


@given(documents_strategy, length_strategy)
def test_segments_are_contiguous_runs_of_one_document(sizes: list[int], row_length: int) -> None:
    batch, _ = pack(sizes, row_length)
    for tokens, targets, segments, positions, mask in zip(*batch, strict=True):
        filled = int(mask.sum())
        assert mask[:filled].all()  # padding only at the end
        padding = np.stack([tokens, targets, segments, positions])[:, filled:]
        assert not padding.any()
        for slot in range(filled):
            if slot and segments[slot] == segments[slot - 1]:
                assert tokens[slot] == tokens[slot - 1] + 1 == targets[slot - 1]
                assert positions[slot] == positions[slot - 1] + 1
            else:
                assert segments[slot] == (segments[slot - 1] + 1 if slot else 1)
                assert positions[slot] == 0


@given(documents_strategy, length_strategy)
def test_only_documents_longer_than_a_row_are_split_into_pieces(
    sizes: list[int], row_length: int
) -> None:
    pieces = split_into_pieces(np.cumsum(sizes) - np.array(sizes), np.array(sizes), row_length)
    expected = [
        length
        for size in sizes
        for length in [row_length] * ((size - 1) // row_length) + [(size - 1) % row_length]
        if size > 1 and length
    ]
    assert pieces.lengths.tolist() == expected


@given(st.lists(st.integers(1, 12), max_size=60))
def test_rows_do_not_overflow_and_are_tight(lengths: list[int]) -> None:
    rows = assign_rows(np.array(lengths, np.int64), 12)
    assert sorted(piece for row in rows for piece in row) == list(range(len(lengths)))
    filled = [sum(lengths[piece] for piece in row) for row in rows]
    assert max(filled, default=0) <= 12
    # The two emptiest rows do not fit into one. Best-fit guarantees this.
    assert len(filled) < 2 or sorted(filled)[0] + sorted(filled)[1] > 12


def test_best_fit_chooses_the_tightest_row() -> None:
    # 7 and 6 leave 3 and 4 free slots: 3 fits both, and the first exactly.
    for lengths, expected in (
        ([3, 6, 7], [[0, 2], [1]]),
        ([3, 6, 4, 7], [[0, 3], [1, 2]]),
        ([5, 5, 10, 5], [[2], [0, 1], [3]]),
    ):
        assert [row.tolist() for row in assign_rows(np.array(lengths), 10)] == expected


def test_share_of_the_longest_document_by_hand() -> None:
    # Rows with documents of 6 and 3 tokens, of 10, and of 4.
    rows = [np.array([0, 2]), np.array([1]), np.array([3])]
    share = longest_share(np.array([6, 10, 3, 4]), rows)
    assert share == pytest.approx((6 / 9 + 1 + 1) / 3)


def test_rows_by_hand() -> None:
    stored = [
        Row(np.array([5, 6, 7, 8, 9], np.int32), np.array([2, 1], np.int32)),
        EMPTY_ROW,
        Row(np.array([1, 2, 3, 4, 5], np.int32), np.array([4], np.int32)),
    ]
    batch = unpack(stored, 4)
    assert [array.dtype for array in batch] == [np.int32] * 4 + [np.bool_]
    assert batch.tokens.tolist() == [[5, 6, 8, 0], [0] * 4, [1, 2, 3, 4]]
    assert batch.targets.tolist() == [[6, 7, 9, 0], [0] * 4, [2, 3, 4, 5]]
    assert batch.segment_ids.tolist() == [[1, 1, 2, 0], [0] * 4, [1, 1, 1, 1]]
    assert batch.positions.tolist() == [[0, 1, 0, 0], [0] * 4, [0, 1, 2, 3]]
    assert batch.loss_mask.tolist() == [[True] * 3 + [False], [False] * 4, [True] * 4]
    assert not unpack([EMPTY_ROW], 4).loss_mask.any()
