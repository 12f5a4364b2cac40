"""Packed rows as they are stored: a TFDS dataset in array_record."""

import contextlib
import io
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from jaxtyping import Int
from tqdm import tqdm

from sat_jax.data.corpus import Tokens
from sat_jax.data.packing import Pieces

ROWS = "packed_rows/1.0.0"  # where TFDS puts the dataset of `PackedRows`


class PackedRows(tfds.core.GeneratorBasedBuilder):
    """Rows as `batches.unpack` reads them: the pieces' tokens, one after the other, and lengths.

    Rows of examples have `answers` too, the runs of slots that bear loss; rows of text pay nothing.
    """

    VERSION = tfds.core.Version("1.0.0")

    def __init__(
        self, data_dir: Path, splits: Mapping[str, Iterator[dict[str, Any]]], answers: bool
    ):
        self._splits = splits
        self._fields = ("tokens", "lengths", *(("answers",) if answers else ()))
        super().__init__(data_dir=str(data_dir), file_format="array_record")

    def _info(self) -> Any:
        # As bytes: six times faster to read than the default list of varints.
        ids = tfds.features.Tensor(shape=(None,), dtype=np.int32, encoding="bytes")
        features = tfds.features.FeaturesDict(dict.fromkeys(self._fields, ids))
        return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        del dl_manager  # nothing is downloaded
        return {split: self._generate_examples(rows) for split, rows in self._splits.items()}

    def _generate_examples(self, rows: Iterator[dict[str, Any]]) -> Iterator[tuple[int, Any]]:
        # TFDS stores the rows in the order of the hashed keys: shuffled, always in the same way.
        yield from enumerate(rows)


def rows_of(
    tokens: Tokens, pieces: Pieces, row_of_piece: Int[np.ndarray, " pieces"]
) -> Iterator[dict[str, Any]]:
    """Each row of `assign_rows`, as it is stored."""
    order = np.argsort(row_of_piece, kind="stable")
    for members in np.split(order, np.flatnonzero(np.diff(row_of_piece[order])) + 1):
        starts, lengths = pieces.starts[members], pieces.lengths[members]
        runs = zip(starts, lengths, strict=True)
        row = {
            "tokens": np.concatenate([tokens.flat[start : start + n + 1] for start, n in runs]),
            "lengths": lengths.astype(np.int32),
        }
        if tokens.answers is not None:
            first, last = _answers_in(tokens.answers, starts, lengths)
            # A token is learnt in the slot before its own.
            shifts = np.cumsum(lengths) - lengths - starts - 1
            inside = [
                tokens.answers[a:b] + shift for a, b, shift in zip(first, last, shifts, strict=True)
            ]
            row["answers"] = np.concatenate(inside).astype(np.int32).reshape(-1)
        yield row


def learnt_targets(tokens: Tokens, pieces: Pieces) -> Int[np.ndarray, " pieces"]:
    """How many targets of each piece bear loss."""
    if tokens.answers is None:
        return pieces.lengths
    first, last = _answers_in(tokens.answers, pieces.starts, pieces.lengths)
    ends = np.concatenate([[0], np.cumsum(tokens.answers[:, 1] - tokens.answers[:, 0])])
    return ends[last] - ends[first]


def _answers_in(
    answers: Int[np.ndarray, "runs 2"],
    starts: Int[np.ndarray, " pieces"],
    lengths: Int[np.ndarray, " pieces"],
) -> tuple[Int[np.ndarray, " pieces"], Int[np.ndarray, " pieces"]]:
    """The number of the first answer of each piece, and of the first one behind it."""
    return (
        np.searchsorted(answers[:, 0], starts),
        np.searchsorted(answers[:, 0], starts + lengths + 1),
    )


def counted(rows: Iterator[dict[str, Any]], shown: tqdm) -> Iterator[dict[str, Any]]:
    """The same rows, each shown when it has been taken."""
    for row in rows:
        yield row
        shown.update()


def write_tfds(folder: Path, splits: Mapping[str, Iterator[dict[str, Any]]], answers: bool) -> None:
    """Writes the rows of each split into `folder / ROWS`; with `answers` where they have such."""
    # Its own messages go to stdout, and its bars know nothing of the whole.
    tfds.display_progress_bar(False)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            PackedRows(folder, splits, answers).download_and_prepare()
        shutil.rmtree(folder / "downloads")  # which it makes even for nothing
    finally:
        tfds.display_progress_bar(True)
