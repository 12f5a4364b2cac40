"""Batches of prepared rows, each a pure function of the step: the data position is the step.

Row i of a run depends only on the seed and i. Therefore neither the number of processes nor an
interruption changes what a step reads.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

import grain
import numpy as np
import tensorflow_datasets as tfds
from jaxtyping import Int

from sat_jax.data.batch import Batch
from sat_jax.data.packed_rows import ROWS
from sat_jax.data.prepare import Prepared
from sat_jax.errors import UserError

T = TypeVar("T")


class Row(NamedTuple):
    """A stored row: the concatenated tokens of its pieces, lengths[p] + 1 tokens each.

    `answers` has the spans of slots with a loss as pairs of first and last + 1; None: all slots
    that are not padding.
    """

    tokens: Int[np.ndarray, " stored"]
    lengths: Int[np.ndarray, " pieces"]
    answers: Int[np.ndarray, " twice_spans"] | None = None


EMPTY_ROW = Row(np.zeros(0, np.int32), np.zeros(0, np.int32))


class TokenRows:
    """The rows of one split, in stored (shuffled) order."""

    def __init__(self, source: Any, row_length: int, path: Path):
        self._source, self.row_length, self._path = source, row_length, path

    def __len__(self) -> int:
        return len(self._source)

    def batch(self, rows: Sequence[int]) -> Batch:
        """Return the rows with these numbers; a number past the last row gives a padding row."""
        try:
            # The bulk read starts a thread per call and takes twice the CPU time of single reads.
            stored = [Row(**self._source[row]) if row < len(self) else EMPTY_ROW for row in rows]
        except Exception as error:  # array_record raises exceptions of many types
            raise _damaged(self._path, error) from error
        return unpack(stored, self.row_length)


def open_split(prepared: Prepared, split: str) -> TokenRows:
    """Return the rows of `split`, "train" or "held_out". Raises `UserError` if they are damaged."""
    if split not in prepared.info.splits:
        raise UserError(f"no split {split!r}; accepted: {', '.join(prepared.info.splits)}")
    try:
        source = tfds.builder_from_directory(prepared.path / ROWS).as_data_source(split)
        count = len(source)
    except Exception as error:  # TFDS raises exceptions of many types
        raise _damaged(prepared.path, error) from error
    if count != prepared.info.splits[split].rows:
        raise _damaged(
            prepared.path,
            f"{count} {split} rows, but info.json says {prepared.info.splits[split].rows}",
        )
    return TokenRows(source, prepared.info.row_length, prepared.path)


def _damaged(path: Path, why: object) -> UserError:
    return UserError(f"{path}: damaged; delete this folder to prepare it again: {why}")


def row_numbers(
    count: int, rows_per_step: int, seed: int, process_index: int = 0, process_count: int = 1
) -> Callable[[int], list[int]]:
    """Return a function from the step to the numbers of this process's rows of that step, out of
    `count` stored rows; see `batches`."""
    local = _local_rows(rows_per_step, process_count)
    order = grain.MapDataset.range(count).seed(seed).shuffle().repeat()

    def get(step: int) -> list[int]:
        first = step * rows_per_step + process_index * local
        return [order[number] for number in range(first, first + local)]

    return get


def batches(
    rows: TokenRows,
    rows_per_step: int,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
    pose_length: int | None = None,
) -> Callable[[int], Batch]:
    """Return a function from the step to this process's rows of that step; steps have no end.

    Every epoch reads every row once, in a new shuffled order. A process reads the consecutive rows
    `[process_index, process_index + 1) * rows_per_step / process_count` of each step. Positions
    skip some up to `pose_length`, where one is given (`skip_positions`).
    """
    numbers = row_numbers(len(rows), rows_per_step, seed, process_index, process_count)

    def get(step: int) -> Batch:
        batch = rows.batch(numbers(step))
        if pose_length is not None:
            local = len(batch.tokens)
            first = step * rows_per_step + process_index * local
            skip_positions(batch, pose_length, [(seed, first + row) for row in range(local)])
        return batch

    return get


def in_order(
    rows: TokenRows,
    rows_per_step: int,
    max_rows: int | None = None,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[Batch]:
    """Yield every row once (or the first `max_rows`) in stored order, for evaluation.

    All batches have the same shape; the last one is completed with padding rows.
    """
    local = _local_rows(rows_per_step, process_count)
    total = len(rows) if max_rows is None else min(max_rows, len(rows))
    for start in range(0, total, rows_per_step):
        first = start + process_index * local
        numbers = range(first, first + local)
        yield rows.batch([row if row < total else len(rows) for row in numbers])


def _local_rows(rows_per_step: int, process_count: int) -> int:
    if rows_per_step % process_count:
        raise UserError(
            f"{rows_per_step} rows per step are not divisible by {process_count} processes"
        )
    return rows_per_step // process_count


def unpack(rows: Sequence[Row], row_length: int) -> Batch:
    """Return the arrays `[len(rows), row_length]` of stored rows."""
    shape = len(rows), row_length
    tokens, targets, segment_ids, positions = (np.zeros(shape, np.int32) for _ in range(4))
    batch = Batch(tokens, targets, segment_ids, positions, np.zeros(shape, np.bool_))
    for index, row in enumerate(rows):
        lengths = row.lengths.astype(np.int64)
        slots = np.arange(lengths.sum())
        piece = np.repeat(np.arange(len(lengths)), lengths)  # of each slot
        inputs = slots + piece  # a piece has one more token than it has slots
        batch.tokens[index, slots] = row.tokens[inputs]
        batch.targets[index, slots] = row.tokens[inputs + 1]
        batch.segment_ids[index, slots] = piece + 1
        batch.positions[index, slots] = slots - (np.cumsum(lengths) - lengths)[piece]
        spans = [(0, len(slots))] if row.answers is None else row.answers.reshape(-1, 2)
        for first, end in spans:
            batch.loss_mask[index, first:end] = True
    return batch


def skip_positions(batch: Batch, length: int, seeds: Sequence[tuple[int, int]]) -> None:
    """Change the positions of each document of n tokens, in place: those after a random token are
    moved by 0 to `length` - n, both uniformly (PoSE, arXiv:2309.10400, section 3.2, with two
    chunks). `seeds`: one for each row."""
    for segments, positions, seed in zip(batch.segment_ids, batch.positions, seeds, strict=True):
        random = np.random.default_rng(seed)
        for document in range(1, segments.max() + 1):
            slots = np.flatnonzero(segments == document)
            if len(slots) > 1:
                cut = random.integers(1, len(slots))
                positions[slots[cut:]] += random.integers(0, length - len(slots) + 1)


class Prefetcher(Generic[T]):
    """Iterator over `get(step)` for `steps`, computed up to `depth` steps ahead in one thread.

    A context manager. An error in `get` is raised when its step is requested.
    """

    def __init__(self, get: Callable[[int], T], steps: Iterable[int], depth: int = 2):
        self._get, self._steps = get, iter(steps)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
        self._ahead: deque[Future[T]] = deque()
        for _ in range(depth):
            self._start_next()

    def _start_next(self) -> None:
        for step in islice(self._steps, 1):
            self._ahead.append(self._thread.submit(self._get, step))

    def __iter__(self) -> "Prefetcher[T]":
        return self

    def __next__(self) -> T:
        if not self._ahead:
            raise StopIteration
        future = self._ahead.popleft()
        self._start_next()
        return future.result()

    def close(self) -> None:
        """Wait for the step that is being computed and cancel the steps after it."""
        self._thread.shutdown(cancel_futures=True)

    def __enter__(self) -> "Prefetcher[T]":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
