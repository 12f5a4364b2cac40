"""Storage of packed rows: a TFDS dataset in array_record."""

import contextlib
import io
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from jaxtyping import Int

from sat_jax.data.corpus import TokenizedDocuments, progress_bar
from sat_jax.data.packing import Pieces

ROWS = "packed_rows/1.0.0"  # the folder in which TFDS stores the dataset of `PackedRows`


class PackedRows(tfds.core.GeneratorBasedBuilder):
    """Rows as `batches.unpack` reads them: the concatenated tokens of the pieces, and lengths.

    Rows of conversations also have `answers`, the spans of slots with a loss. TFDS derives the
    folder name from the name of this class.
    """

    VERSION = tfds.core.Version("1.0.0")

    def __init__(
        self, data_dir: Path, splits: Mapping[str, Iterator[dict[str, Any]]], answers: bool
    ):
        self._splits = splits
        self._fields = ("tokens", "lengths", *(("answers",) if answers else ()))
        super().__init__(data_dir=str(data_dir), file_format="array_record")

    def _info(self) -> Any:
        # Bytes are six times faster to read than the default list of varints.
        ids = tfds.features.Tensor(shape=(None,), dtype=np.int32, encoding="bytes")
        features = tfds.features.FeaturesDict(dict.fromkeys(self._fields, ids))
        return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        del dl_manager  # nothing is downloaded
        return {split: self._generate_examples(rows) for split, rows in self._splits.items()}

    def _generate_examples(self, rows: Iterator[dict[str, Any]]) -> Iterator[tuple[int, Any]]:
        # TFDS stores the rows in the order of their hashed keys, which is a fixed shuffle.
        yield from enumerate(rows)


def stored_rows(
    documents: TokenizedDocuments,
    pieces: Pieces,
    rows: Sequence[Int[np.ndarray, " pieces"]],
    progress: bool,
) -> Iterator[dict[str, Any]]:
    """Yield the rows of `assign_rows` in the stored format."""
    for members in progress_bar("writing", " rows", progress, values=rows):
        starts, lengths = pieces.starts[members], pieces.lengths[members]
        runs = zip(starts, lengths, strict=True)
        row = {
            "tokens": np.concatenate([documents.ids[start : start + n + 1] for start, n in runs]),
            "lengths": lengths.astype(np.int32),
        }
        spans = documents.answer_spans
        if spans is not None:
            first, last = _span_range(spans, starts, lengths)
            # A token is the target of the slot before its own.
            shifts = np.cumsum(lengths) - lengths - starts - 1
            row_spans = [
                spans[a:b] + shift for a, b, shift in zip(first, last, shifts, strict=True)
            ]
            row["answers"] = np.concatenate(row_spans).astype(np.int32).reshape(-1)
        yield row


def targets_with_loss(documents: TokenizedDocuments, pieces: Pieces) -> Int[np.ndarray, " pieces"]:
    """Return the number of targets with a loss in each piece."""
    spans = documents.answer_spans
    if spans is None:
        return pieces.lengths
    first, last = _span_range(spans, pieces.starts, pieces.lengths)
    ends = np.concatenate([[0], np.cumsum(spans[:, 1] - spans[:, 0])])
    return ends[last] - ends[first]


def _span_range(
    spans: Int[np.ndarray, "spans 2"],
    starts: Int[np.ndarray, " pieces"],
    lengths: Int[np.ndarray, " pieces"],
) -> tuple[Int[np.ndarray, " pieces"], Int[np.ndarray, " pieces"]]:
    """Return the index of the first span of each piece, and of the first span after it."""
    return (
        np.searchsorted(spans[:, 0], starts),
        np.searchsorted(spans[:, 0], starts + lengths + 1),
    )


def write_tfds(folder: Path, splits: Mapping[str, Iterator[dict[str, Any]]], answers: bool) -> None:
    """Write the rows of each split into `folder / ROWS`; `answers`: the rows have answer spans."""
    # TFDS prints its messages on stdout, and its progress bars do not show the total.
    tfds.display_progress_bar(False)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            PackedRows(folder, splits, answers).download_and_prepare()
        shutil.rmtree(folder / "downloads")  # TFDS creates this folder even without downloads
    finally:
        tfds.display_progress_bar(True)
