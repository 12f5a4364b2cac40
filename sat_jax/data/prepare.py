"""Text, tokenized and packed once: a TFDS dataset in array_record, named by what it was made from.

`<root>/<fingerprint>/` holds the rows (`packed_rows/`) and `info.json`. It is made beside its place
under a lock, and renamed when it is whole: an interrupted preparation is never taken for one.
"""

import contextlib
import fcntl
import hashlib
import io
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import tensorflow_datasets as tfds
from jaxtyping import Int
from tqdm import tqdm

from sat_jax.cache import cache_dir
from sat_jax.data.corpus import Tokens, read_index, split_end, tokenize
from sat_jax.data.packing import Pieces, assign_rows, cut
from sat_jax.data.progress import bar
from sat_jax.data.sources import Source, resolve_sources
from sat_jax.data.splits import (
    HELD_OUT,
    TRAIN,
    budgets,
    check_held_out,
    choose_held_out,
    holds_out_end,
    sampling_order,
)
from sat_jax.data.tokenizer import Tokenizer
from sat_jax.errors import UserError, why_no_folder

FORMAT = 1  # of what is written; another one is another fingerprint
ROWS = "packed_rows/1.0.0"  # where TFDS puts the dataset of `PackedRows`
_INFO = "info.json"
_UNFINISHED = ".unfinished"


@dataclass(frozen=True)
class SplitInfo:
    """What one split holds."""

    documents: int
    text_bytes: int  # UTF-8 of those documents, for perplexity per byte
    tokens: int  # bos and eos among them
    targets: int  # tokens that are predicted: all but the first of each document
    rows: int
    long_documents: int  # longer than a row, and so cut into several
    useful_share: float  # of the rows' slots


@dataclass(frozen=True)
class PreparedInfo:
    """What a preparation was made from, and what came out."""

    fingerprint: str
    tokenizer: str
    vocab_size: int  # of the tokenizer
    row_length: int
    held_out: float
    max_tokens: int | None
    sources: list[str]
    files: int
    documents: int  # with text, in all sources
    empty_documents: int  # left out
    splits: dict[str, SplitInfo]


@dataclass(frozen=True)
class Prepared:
    """Prepared data in `path`."""

    path: Path
    info: PreparedInfo


class PackedRows(tfds.core.GeneratorBasedBuilder):
    """Rows as `batches.unpack` reads them: the pieces' tokens, one after the other, and lengths."""

    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, data_dir: Path, splits: Mapping[str, Iterator[dict[str, Any]]]):
        self._splits = splits
        super().__init__(data_dir=str(data_dir), file_format="array_record")

    def _info(self) -> Any:
        # As bytes: six times faster to read than the default list of varints.
        ids = tfds.features.Tensor(shape=(None,), dtype=np.int32, encoding="bytes")
        features = tfds.features.FeaturesDict({"tokens": ids, "lengths": ids})
        return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        del dl_manager  # nothing is downloaded
        return {split: self._generate_examples(rows) for split, rows in self._splits.items()}

    def _generate_examples(self, rows: Iterator[dict[str, Any]]) -> Iterator[tuple[int, Any]]:
        # TFDS stores the rows in the order of the hashed keys: shuffled, always in the same way.
        yield from enumerate(rows)


def prepare(
    *,
    sources: str | Sequence[str],
    tokenizer: Tokenizer,
    row_length: int,
    held_out: float,
    max_tokens: int | None = None,
    text_field: str = "text",
    model_vocab_size: int | None = None,
    root: Path | None = None,
    log: Callable[[str], None] | None = None,
) -> Prepared:
    """Tokenizes and packs `sources`, or finds that this has been done: then it changes nothing.

    `sources` as in `resolve_sources`; `held_out` as in `choose_held_out`; `max_tokens` caps both
    splits together and cuts the last document it takes. The result lies in `root` (default: the
    cache). `log` gets a line of what was done; without it there are no progress bars either.
    Raises `UserError` for bad input and for a tokenizer with more ids than `model_vocab_size`.
    """
    for name, value, least in (("row length", row_length, 2), ("max tokens", max_tokens, 4)):
        if value is not None and value < least:
            raise UserError(f"{name} {value}; accepted: a whole number from {least} on")
    check_held_out(held_out)
    if model_vocab_size is not None:
        tokenizer.check_fits(model_vocab_size)
    files = resolve_sources(sources)
    root = root or cache_dir("data")
    settings = {
        "format": FORMAT,
        "tokenizer": tokenizer.fingerprint,
        "row_length": row_length,
        "held_out": float(held_out),
        "max_tokens": max_tokens,
        "text_field": text_field,
    }
    try:
        root.mkdir(parents=True, exist_ok=True)
        fingerprint = _fingerprint(settings, files, root)
        path = root / fingerprint
        with _locked(root / f"{fingerprint}.lock", log):
            done = "already prepared" if path.exists() else "prepared"
            if done == "prepared":
                with _replacing(path) as unfinished:
                    splits, documents, empty = _write(
                        unfinished,
                        sources=files,
                        tokenizer=tokenizer,
                        row_length=row_length,
                        held_out=held_out,
                        max_tokens=max_tokens,
                        text_field=text_field,
                        progress=log is not None,
                    )
                    info = PreparedInfo(
                        fingerprint=fingerprint,
                        tokenizer=tokenizer.name,
                        vocab_size=tokenizer.vocab_size,
                        row_length=row_length,
                        held_out=held_out,
                        max_tokens=max_tokens,
                        sources=[sources] if isinstance(sources, str) else list(sources),
                        files=len(files),
                        documents=documents,
                        empty_documents=empty,
                        splits=splits,
                    )
                    (unfinished / _INFO).write_text(json.dumps(asdict(info), indent=2) + "\n")
    except OSError as error:
        raise UserError(f"{error.filename or root}: {why_no_folder(error)}") from error
    prepared = load_prepared(path)
    if log is not None:
        splits = prepared.info.splits
        if prepared.info.documents == 1:
            count = splits[HELD_OUT].tokens
            log(f"data: one document; held out are {count:,} tokens of its last {held_out:.1%}")
        rows = ", ".join(f"{split.rows} {name} rows" for name, split in splits.items())
        log(f"data: {done}, {rows} of {row_length} tokens in {path}")
    return prepared


def load_prepared(path: Path) -> Prepared:
    """What `prepare` left in `path`, or in the only such folder in it (its `root`).

    Raises `UserError` where that is something else.
    """
    path = _prepared_folder(path)
    try:
        content = json.loads((path / _INFO).read_text())
        splits = {name: SplitInfo(**split) for name, split in content.pop("splits").items()}
        return Prepared(path, PreparedInfo(splits=splits, **content))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path}: no prepared data of this version; delete it to prepare it again: {error}"
        ) from error


def _prepared_folder(path: Path) -> Path:
    if not path.is_dir():
        raise UserError(f"{path}: there is no such folder of prepared data")
    if (path / _INFO).is_file():
        return path
    found = sorted(file.parent for file in path.glob(f"*/{_INFO}"))
    found = [folder for folder in found if folder.suffix != _UNFINISHED]
    if not found:
        raise UserError(f"{path}: no prepared data: it has no {_INFO}")
    if len(found) > 1:
        names = ", ".join(folder.name for folder in found)
        raise UserError(f"{path}: holds more than one preparation; accepted: one of {names}")
    return found[0]


def _fingerprint(settings: dict[str, Any], sources: Sequence[Source], root: Path) -> str:
    """The name of what `settings` make of the content of `sources`.

    Content is hashed once: the answer is kept for the same paths, sizes and modification times,
    unless a file is so young that it could change once more within the clock's resolution.
    """
    stats = {file: file.stat() for source in sources for file in source.files()}
    stamps = [[str(file.resolve()), at.st_size, at.st_mtime_ns] for file, at in stats.items()]
    kinds = [[source.kind, source.split] for source in sources]
    known = root / "known" / _digest([settings, kinds, stamps])
    if known.is_file():
        return known.read_text()
    settled = max(at.st_mtime for at in stats.values()) < time.time() - 2
    fingerprint = _digest([settings, [source.content_hash() for source in sources]])
    if settled:
        known.parent.mkdir(exist_ok=True)
        unfinished = known.with_suffix(f".{os.getpid()}")
        unfinished.write_text(fingerprint)
        unfinished.rename(known)
    return fingerprint


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:20]


@contextlib.contextmanager
def _locked(file: Path, log: Callable[[str], None] | None) -> Iterator[None]:
    """Holds `file` during the block, and removes it: nothing is left of what was refused."""
    while True:
        with file.open("w") as stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if log is not None:
                    log("data: another process is preparing the same; waiting for it")
                fcntl.flock(stream, fcntl.LOCK_EX)
            # What was waited for has been removed by its holder, and the next process makes anew.
            if _is_at(stream, file):
                try:
                    yield
                finally:
                    file.unlink()
                return


def _is_at(stream: IO[str], file: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(stream.fileno()), file.stat())
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A fresh folder that becomes `path` if the block succeeds, and is removed otherwise."""
    unfinished = path.with_name(path.name + _UNFINISHED)
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    try:
        yield unfinished
        unfinished.rename(path)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _write(
    folder: Path,
    *,
    sources: Sequence[Source],
    tokenizer: Tokenizer,
    row_length: int,
    held_out: float,
    max_tokens: int | None,
    text_field: str,
    progress: bool,
) -> tuple[dict[str, SplitInfo], int, int]:
    """Writes the rows of both splits. Returns what they hold, all documents and the empty ones."""
    index = read_index(sources, text_field, progress)
    chosen = choose_held_out(index, held_out)
    orders = {TRAIN: sampling_order(index, ~chosen), HELD_OUT: sampling_order(index, chosen)}
    end = holds_out_end(index, held_out)
    share = held_out if end else float(chosen.mean())
    limits = None if max_tokens is None else budgets(share, max_tokens)
    file = folder / "tokens"
    tokens = tokenize(sources, text_field, index, orders, limits, tokenizer, file, progress)
    byte_sizes = index.sizes
    if end:
        tokens, byte_sizes = split_end(tokens, int(index.sizes[0]), share, tokenizer)
        orders = {TRAIN: np.array([0]), HELD_OUT: np.array([1])}
    splits, rows = {}, {}
    for split, order in orders.items():
        taken, sizes = _cap(tokens.sizes[order], None if limits is None else limits[split])
        order = order[:taken]
        text_bytes = int(byte_sizes[order].sum())
        if sizes[-1] < tokens.sizes[order[-1]]:  # cut: count what is left of its text
            start = tokens.starts[order[-1]]
            text = tokenizer.decode(tokens.flat[start : start + sizes[-1]].tolist())
            text_bytes += len(text.encode()) - int(byte_sizes[order[-1]])
        pieces = cut(tokens.starts[order], sizes, row_length)
        if not len(pieces.lengths):
            raise UserError(f"no document of the {split} split has two tokens")
        row_of_piece = assign_rows(pieces.lengths, row_length)
        targets, count = int(pieces.lengths.sum()), int(row_of_piece.max()) + 1
        splits[split] = SplitInfo(
            documents=taken,
            text_bytes=text_bytes,
            tokens=int(sizes.sum()),
            targets=targets,
            rows=count,
            long_documents=int((sizes - 1 > row_length).sum()),
            useful_share=targets / (count * row_length),
        )
        rows[split] = _rows(tokens, pieces, row_of_piece)
    total = sum(split.rows for split in splits.values())
    with bar("writing", " rows", progress, total) as shown:
        _write_tfds(folder, {split: _counted(many, shown) for split, many in rows.items()})
    file.unlink()
    return splits, len(index.sizes), index.empty


def _cap(
    sizes: Int[np.ndarray, " documents"], budget: int | None
) -> tuple[int, Int[np.ndarray, " taken"]]:
    """How many of the documents fill `budget`, and their sizes, the last one's cut to fit."""
    if budget is None:
        return len(sizes), sizes
    ends = np.cumsum(sizes)
    taken = min(
        int(np.searchsorted(ends, budget)) + 1, int(np.flatnonzero(sizes).max(initial=0)) + 1
    )
    sizes = sizes[:taken].copy()
    sizes[-1] -= max(0, ends[taken - 1] - budget)
    return taken, sizes


def _rows(
    tokens: Tokens, pieces: Pieces, row_of_piece: Int[np.ndarray, " pieces"]
) -> Iterator[dict[str, Any]]:
    order = np.argsort(row_of_piece, kind="stable")
    for members in np.split(order, np.flatnonzero(np.diff(row_of_piece[order])) + 1):
        runs = zip(pieces.starts[members], pieces.lengths[members], strict=True)
        yield {
            "tokens": np.concatenate([tokens.flat[start : start + n + 1] for start, n in runs]),
            "lengths": pieces.lengths[members].astype(np.int32),
        }


def _counted(rows: Iterator[dict[str, Any]], shown: tqdm) -> Iterator[dict[str, Any]]:
    for row in rows:
        yield row
        shown.update()


def _write_tfds(folder: Path, splits: Mapping[str, Iterator[dict[str, Any]]]) -> None:
    # Its own messages go to stdout, and its bars know nothing of the whole.
    tfds.display_progress_bar(False)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            PackedRows(folder, splits).download_and_prepare()
        shutil.rmtree(folder / "downloads")  # which it makes even for nothing
    finally:
        tfds.display_progress_bar(True)
