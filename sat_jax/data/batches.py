"""Prepared rows to batches, each a pure function of the step: the data position is the step.

Row i of the run is fixed by the seed and i alone, so that neither the number of processes nor where
a run was interrupted changes what any step reads.
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
    """A row as it is stored: the tokens of its pieces one after the other, lengths[p] + 1 each.

    Of examples, `answers` has the runs of slots that bear loss: first and one past, in pairs. None:
    all that are no padding.
    """

    tokens: Int[np.ndarray, " stored"]
    lengths: Int[np.ndarray, " pieces"]
    answers: Int[np.ndarray, " twice_runs"] | None = None


BLANK = Row(np.zeros(0, np.int32), np.zeros(0, np.int32))


class TokenRows:
    """The rows of one split, in their stored (shuffled) order."""

    def __init__(self, source: Any, row_length: int, path: Path):
        self._source, self.row_length, self._path = source, row_length, path

    def __len__(self) -> int:
        return len(self._source)

    def batch(self, rows: Sequence[int]) -> Batch:
        """The rows of these numbers; a number past the last one gives a row of padding."""
        try:
            # One by one: the bulk read starts a thread each time, and takes twice the CPU time.
            found = [Row(**self._source[row]) if row < len(self) else BLANK for row in rows]
        except Exception as error:  # array_record has no error class of its own
            raise _damaged(self._path, error) from error
        return unpack(found, self.row_length)


def open_split(prepared: Prepared, split: str) -> TokenRows:
    """The rows of `split`, "train" or "held_out". Raises `UserError` where they are damaged."""
    if split not in prepared.info.splits:
        raise UserError(f"no split {split!r}; accepted: {', '.join(prepared.info.splits)}")
    try:
        source = tfds.builder_from_directory(prepared.path / ROWS).as_data_source(split)
        count = len(source)
    except Exception as error:  # nor has TFDS
        raise _damaged(prepared.path, error) from error
    if count != prepared.info.splits[split].rows:
        raise _damaged(prepared.path, f"{count} {split} rows, not as many as info.json says")
    return TokenRows(source, prepared.info.row_length, prepared.path)


def _damaged(path: Path, why: object) -> UserError:
    return UserError(f"{path}: damaged; delete this folder to prepare it again: {why}")


def batches(
    rows: TokenRows, rows_per_step: int, seed: int, process_index: int = 0, process_count: int = 1
) -> Callable[[int], Batch]:
    """A function from the step to this process's rows of it, without end.

    Every epoch takes every row once, shuffled anew. `process_index` has the consecutive rows
    `[process_index, process_index + 1) * rows_per_step / process_count` of each step.
    """
    local = _local_rows(rows_per_step, process_count)
    order = grain.MapDataset.range(len(rows)).seed(seed).shuffle().repeat()

    def get(step: int) -> Batch:
        first = step * rows_per_step + process_index * local
        return rows.batch([order[index] for index in range(first, first + local)])

    return get


def in_order(
    rows: TokenRows,
    rows_per_step: int,
    max_rows: int | None = None,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[Batch]:
    """Every row once (or the first `max_rows`), as stored: for evaluation.

    All batches have the same shape; the last is filled up with rows of padding.
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
            f"{rows_per_step} rows a step cannot be shared by {process_count} processes equally"
        )
    return rows_per_step // process_count


def unpack(rows: Sequence[Row], row_length: int) -> Batch:
    """The arrays `[len(rows), row_length]` that stored rows stand for."""
    tokens = np.concatenate([row.tokens for row in rows])
    lengths = np.concatenate([row.lengths for row in rows]).astype(np.int64)
    pieces = np.array([len(row.lengths) for row in rows])
    first = np.cumsum(pieces) - pieces  # piece of each row
    row = np.repeat(np.arange(len(rows)), pieces)
    ends = np.concatenate([[0], np.cumsum(lengths)])  # of the pieces, in pairs
    # Where each piece begins among the slots of all rows and among the stored tokens, which have
    # one more for each piece before it.
    slot = ends[:-1] - ends[first][row] + row * row_length
    source = ends[:-1] + np.arange(len(lengths))

    positions = np.arange(ends[-1]) - np.repeat(ends[:-1], lengths)
    slots = np.repeat(slot, lengths) + positions
    taken = np.repeat(source, lengths) + positions
    numbers = np.repeat(np.arange(len(lengths)) - first[row] + 1, lengths)

    def spread(values: Any, dtype: type) -> Any:
        array: Any = np.zeros(len(rows) * row_length, dtype)
        array[slots] = values
        return array.reshape(len(rows), row_length)

    loss_mask = spread(True, np.bool_)
    for number, stored in enumerate(rows):
        if stored.answers is not None:
            loss_mask[number] = False
            for run in stored.answers.reshape(-1, 2):
                loss_mask[number, slice(*run)] = True
    return Batch(
        tokens=spread(tokens[taken], np.int32),
        targets=spread(tokens[taken + 1], np.int32),
        segment_ids=spread(numbers, np.int32),
        positions=spread(positions, np.int32),
        loss_mask=loss_mask,
    )


class Prefetcher(Generic[T]):
    """`get(step)` for each of `steps`, in order, made up to `depth` ahead in one thread.

    A context manager; an error in `get` is raised where its step is asked for.
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
        made = self._ahead.popleft()
        self._start_next()
        return made.result()

    def close(self) -> None:
        """Waits for the step in the making and drops what is ahead."""
        self._thread.shutdown(cancel_futures=True)

    def __enter__(self) -> "Prefetcher[T]":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
