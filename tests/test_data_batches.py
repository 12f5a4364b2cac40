"""Batches: what a step reads depends only on the seed and the step."""

import threading
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sat_jax.data.batch import Batch
from sat_jax.data.batches import (
    Prefetcher,
    TokenRows,
    batches,
    in_order,
    open_split,
    skip_positions,
)
from sat_jax.data.prepare import prepare
from sat_jax.data.tokenizer import load_tokenizer
from sat_jax.errors import UserError

LENGTH = 3


class NumberedRows:
    """Stored rows, each filled with its number."""

    def __init__(self, size: int):
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, row: int) -> dict[str, np.ndarray]:
        assert 0 <= row < self.size
        lengths = np.array([LENGTH], np.int32)
        return {"tokens": np.full(LENGTH + 1, row, np.int32), "lengths": lengths}


def numbered(size: int) -> TokenRows:
    return TokenRows(NumberedRows(size), LENGTH, Path("numbered"))


def numbers(batch: Batch) -> list[int]:
    assert (batch.tokens == batch.tokens[:, :1]).all()
    return batch.tokens[:, 0].tolist()


def joined(parts: Sequence[Batch]) -> Batch:
    return Batch(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))


@settings(max_examples=20)
@given(st.integers(1, 20), st.integers(1, 8), st.integers(0, 2**31 - 1))
def test_every_epoch_reads_every_row_once(size: int, rows_per_step: int, seed: int) -> None:
    get = batches(numbered(size), rows_per_step, seed)
    steps = -(-3 * size // rows_per_step)
    read = [row for step in range(steps) for row in numbers(get(step))]
    for epoch in range(3):
        assert sorted(read[epoch * size : (epoch + 1) * size]) == list(range(size))


def test_order_depends_on_epoch_and_seed() -> None:
    first, again, other = (
        [numbers(batches(numbered(50), 50, seed)(step)) for step in range(2)] for seed in (0, 0, 1)
    )
    assert first == again
    assert len({tuple(rows) for rows in (*first, *other)}) == 4
    assert first[0] != sorted(first[0])


@pytest.mark.parametrize("process_count", [2, 4])
def test_rows_of_a_step_do_not_depend_on_the_number_of_processes(process_count: int) -> None:
    single = batches(numbered(23), 8, seed=3)
    parts = [batches(numbered(23), 8, 3, index, process_count) for index in range(process_count)]
    for step in range(10):
        together = joined([part(step) for part in parts])
        assert all(map(np.array_equal, together, single(step)))


def test_positions_of_a_document_skip_once_up_to_the_length() -> None:
    """Rows of a document of 2 tokens and one of 5, 1 of padding: extended to 20 positions."""
    segments = np.tile(np.array([1, 1, 2, 2, 2, 2, 2, 0], np.int32), (400, 1))
    plain = np.tile(np.array([0, 1, 0, 1, 2, 3, 4, 0], np.int32), (400, 1))
    blank = np.zeros_like(plain)
    batch = Batch(blank, blank, segments, plain.copy(), blank.astype(bool))
    skip_positions(batch, 20, [(0, number) for number in range(400)])
    np.testing.assert_array_equal(batch.positions[:, [0, 2, 7]], 0)
    short, long = batch.positions[:, 1] - 1, np.diff(batch.positions[:, 2:7]) - 1
    assert {*short.tolist()} == {*range(19)}, "2 tokens: 0 to 18 positions are left out"
    assert (np.count_nonzero(long, axis=1) <= 1).all(), "one gap"
    assert {*long.sum(axis=1).tolist()} == {*range(16)}
    for cut in range(4):
        assert 60 < np.count_nonzero(long[:, cut]) < 130, "a quarter of the rows at each token"


def test_skipped_positions_depend_on_the_seed_and_the_row_alone() -> None:
    single = batches(numbered(23), 8, seed=3, pose_length=9)
    parts = [batches(numbered(23), 8, 3, index, 2, pose_length=9) for index in range(2)]
    for step in range(5):
        assert all(map(np.array_equal, joined([part(step) for part in parts]), single(step)))
    assert (single(0).positions.max(axis=1) < 9).all() and single(0).positions.max() > LENGTH
    other = batches(numbered(23), 8, seed=4, pose_length=9)
    assert not np.array_equal(single(0).positions, other(0).positions)


def test_rows_per_step_must_be_divisible_by_processes() -> None:
    with pytest.raises(UserError, match="8 rows per step are not divisible by 3 processes"):
        batches(numbered(5), 8, 0, process_count=3)
    with pytest.raises(UserError, match="by 3 processes"):
        next(in_order(numbered(5), 8, process_count=3))


@pytest.mark.parametrize(("size", "limit", "expected"), [(10, None, 10), (10, 5, 5), (3, 9, 3)])
@pytest.mark.parametrize("process_count", [1, 2, 4])
def test_in_order_reads_each_row_once_and_pads(
    size: int, limit: int | None, expected: int, process_count: int
) -> None:
    parts = [
        list(in_order(numbered(size), 4, limit, index, process_count))
        for index in range(process_count)
    ]
    steps = [joined(batch) for batch in zip(*parts, strict=True)]
    assert all(batch.tokens.shape == (4, LENGTH) for batch in steps)
    everything = joined(steps)
    assert numbers(everything)[:expected] == list(range(expected))
    assert everything.loss_mask[:expected].all()
    assert not any(array[expected:].any() for array in everything)


def test_prepared_rows_can_be_read_from_any_step(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for index in range(20):
        (tmp_path / "in" / f"{index}.txt").write_text(f"{index} " * (index + 1))
    prepared = prepare(
        sources=str(tmp_path / "in"),
        tokenizer=load_tokenizer("bytes"),
        row_length=8,
        held_out=0.1,
        root=tmp_path,
    )
    run = batches(open_split(prepared, "train"), 4, seed=1)
    unbroken = [run(step) for step in range(6)]
    resumed = batches(open_split(prepared, "train"), 4, seed=1)
    for step in (5, 3, 4):
        assert all(map(np.array_equal, resumed(step), unbroken[step]))
    with pytest.raises(UserError, match="no split 'test'; accepted: train, held_out"):
        open_split(prepared, "test")


def test_prefetcher_keeps_order_and_depth() -> None:
    computed: list[int] = []

    def get(step: int) -> int:
        computed.append(step)
        return step * step

    with Prefetcher(get, range(3, 9), depth=2) as ahead:
        assert next(ahead) == 9
        deadline = time.monotonic() + 10
        while len(computed) < 3 and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(0.01)
        assert computed == [3, 4, 5]  # the requested step and two steps ahead
        assert list(ahead) == [16, 25, 36, 49, 64]
    assert computed == [3, 4, 5, 6, 7, 8]


def test_prefetcher_uses_one_thread_and_ends_it() -> None:
    with Prefetcher(lambda _: threading.current_thread(), range(100)) as ahead:
        thread = next(ahead)
        assert thread is not threading.current_thread()
    assert not thread.is_alive()


def test_prefetcher_raises_an_error_at_its_step() -> None:
    def get(step: int) -> int:
        if step == 2:
            raise UserError("damaged")
        return step

    before = threading.active_count()
    with pytest.raises(UserError, match="damaged"), Prefetcher(get, range(5)) as ahead:
        assert [next(ahead), next(ahead)] == [0, 1]
        next(ahead)
    assert threading.active_count() == before
