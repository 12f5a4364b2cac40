"""Preparation of training data: text is tokenized and packed once, into a TFDS dataset.

`<root>/<fingerprint>/` contains the rows (`packed_rows/`, in array_record) and `info.json`. The
folder is written under a temporary name, with a lock, and renamed when it is complete. Therefore an
interrupted preparation is never used.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from sat_jax.cache import cache_dir
from sat_jax.data.conversations import conversation_reader
from sat_jax.data.corpus import Reader, read_index, split_at_end, text_reader, tokenize
from sat_jax.data.data_format import TOO_LONG_ACTIONS, DataFormat
from sat_jax.data.packed_rows import stored_rows, targets_with_loss, write_tfds
from sat_jax.data.packing import assign_rows, longest_share, split_into_pieces
from sat_jax.data.sources import Source, counted, resolve_sources
from sat_jax.data.splits import HELD_OUT, TRAIN, split_budget, split_documents
from sat_jax.data.token_budget import select
from sat_jax.data.tokenizer import Tokenizer
from sat_jax.errors import UserError, folder_error

FORMAT = 3  # version of the stored format, part of the fingerprint
_INFO = "info.json"
_UNFINISHED = ".unfinished"
_SETTLED_SECONDS = 2


@dataclass(frozen=True)
class SplitInfo:
    """Sizes of one split; documents may be conversations. The field names are keys of info.json."""

    documents: int
    text_bytes: int  # UTF-8 bytes of the text with a loss, for the perplexity per byte
    tokens: int  # including bos and eos
    targets: int  # tokens with a loss: answers, or all but the first of each text document
    rows: int
    long_documents: int  # longer than a row: texts are split, conversations dropped or truncated
    useful_share: float  # share of the rows' slots that are not padding
    # Share of a row's tokens in its longest document, mean over rows; None: not counted, in folders
    # that were made up to commit 0d2427c.
    longest_share: float | None = None


@dataclass(frozen=True)
class PreparedInfo:
    """Input and result of a preparation. The field names are keys of info.json."""

    fingerprint: str
    tokenizer: str
    vocab_size: int  # of the tokenizer
    row_length: int
    held_out: float
    max_tokens: int | None
    form: dict[str, Any]  # the `DataFormat` of the documents
    sources: list[str]
    files: int
    documents: int  # in all sources, without those in `left_out`
    left_out: dict[str, int]  # number of skipped documents, by reason
    splits: dict[str, SplitInfo]
    unused_fields: dict[str, int] = field(default_factory=dict)  # documents by name, at most 20


@dataclass(frozen=True)
class Prepared:
    """Prepared data in `path`."""

    path: Path
    info: PreparedInfo


def prepare(
    *,
    sources: str | Sequence[str],
    tokenizer: Tokenizer,
    row_length: int,
    held_out: float,
    max_tokens: int | None = None,
    data_format: DataFormat = DataFormat(),
    root: Path | None = None,
    log: Callable[[str], None] | None = None,
) -> Prepared:
    """Tokenize and pack `sources` into `root` (default: the cache), unless that is already done.

    `sources` as in `resolve_sources`; `held_out` is a share of the documents (of the tokens if
    there is one text) if below 1, otherwise their number. `max_tokens` limits both splits together:
    the last text that is selected is truncated, a conversation is never truncated for it. `log`
    receives lines about the result; if it is None, no progress bars are shown either. Raises
    `UserError` for bad input.
    """
    for name, value, minimum in (
        ("row length", row_length, 2),
        ("max tokens", max_tokens, 4),
        ("min document tokens", data_format.min_document_tokens, 2),
    ):
        if value is not None and value < minimum:
            raise UserError(f"{name} {value}; accepted: a whole number, {minimum} or more")
    if not held_out > 0 or (held_out >= 1 and held_out % 1 != 0):
        raise UserError(
            f"held-out {held_out}; accepted: a share between 0 and 1, or a whole number of"
            " documents, 1 or more"
        )
    files = resolve_sources(sources, log and (lambda line: log(f"data: {line}")))
    if data_format.is_text:
        fields = data_format.text_field, tokenizer, data_format.min_document_tokens
        reader = text_reader(*fields)
    else:
        reader = conversation_reader(data_format, tokenizer, row_length)
    root = root or cache_dir("data")
    sizes: dict[str, Any] = {
        "row_length": row_length,
        "held_out": held_out,
        "max_tokens": max_tokens,
    }
    settings = {
        **sizes,
        "held_out": float(held_out),
        "format": FORMAT,
        "tokenizer": tokenizer.fingerprint,
        "reader": reader.settings,
    }
    status = "already prepared"
    try:
        root.mkdir(parents=True, exist_ok=True)
        fingerprint = _fingerprint(settings, files, root)
        path = root / fingerprint
        with locked(root / f"{fingerprint}.lock", log):
            if not path.exists():
                status = "prepared"
                with complete_folder(path) as folder:
                    counts = _write(folder, files, reader, tokenizer, log is not None, **sizes)
                    info = PreparedInfo(
                        fingerprint=fingerprint,
                        tokenizer=tokenizer.name,
                        vocab_size=tokenizer.vocab_size,
                        **sizes,
                        form=asdict(data_format),
                        sources=[sources] if isinstance(sources, str) else list(sources),
                        files=len(files),
                        **counts,
                    )
                    (folder / _INFO).write_text(json.dumps(asdict(info), indent=2) + "\n")
    except OSError as error:
        raise UserError(f"{error.filename or root}: {folder_error(error)}") from error
    prepared = load_prepared(path)
    if log is not None:
        for line in _description(prepared, status):
            log(f"data: {line}")
    return prepared


def _description(prepared: Prepared, status: str) -> Iterator[str]:
    """Yield lines on the sizes of the splits and the examples that were skipped or truncated."""
    info = prepared.info
    if info.documents == 1:
        count = info.splits[HELD_OUT].tokens
        yield f"one document; its last {info.held_out:.1%} ({count:,} tokens) are held out"
    if info.form["format"] != "text":
        long_documents = sum(split.long_documents for split in info.splits.values())
        action = TOO_LONG_ACTIONS[info.form["too_long"]]
        reasons = info.left_out | {f"longer than a row ({action})": long_documents}
        splits = [
            f"{split.documents:,} {name} examples, loss on {split.targets:,} of {split.tokens:,}"
            f" tokens in {split.useful_share:.0%} of the slots"
            for name, split in info.splits.items()
        ]
        yield "; ".join([*splits, f"skipped or truncated: {counted(reasons)}"])
    if info.unused_fields:
        names = ", ".join(f"{name!r} ({count})" for name, count in info.unused_fields.items())
        yield f"fields that are not used, with the number of documents: {names}"
    rows = ", ".join(f"{split.rows} {name} rows" for name, split in info.splits.items())
    yield f"{status}, {rows} of {info.row_length} tokens in {prepared.path}"


def load_prepared(path: Path) -> Prepared:
    """Return the prepared data in `path`, or in the only such folder in it (if it is a `root`).

    Raises `UserError` if it is something else.
    """
    path = _prepared_folder(path)
    try:
        content = json.loads((path / _INFO).read_text())
        splits = content.pop("splits")
        for split in splits.values():
            split.pop("row_targets", None)  # of folders that were made up to commit 09323b3
        splits = {name: SplitInfo(**split) for name, split in splits.items()}
        return Prepared(path, PreparedInfo(splits=splits, **content))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path}: not prepared data of this version; delete it to prepare it again: {error}"
        ) from error


def _prepared_folder(path: Path) -> Path:
    if not path.is_dir():
        raise UserError(f"{path}: no such folder of prepared data")
    if (path / _INFO).is_file():
        return path
    folders = sorted(file.parent for file in path.glob(f"*/{_INFO}"))
    folders = [folder for folder in folders if folder.suffix != _UNFINISHED]
    if not folders:
        raise UserError(f"{path}: no prepared data: it has no {_INFO}")
    if len(folders) > 1:
        names = ", ".join(folder.name for folder in folders)
        raise UserError(f"{path}: several folders of prepared data; accepted: one of {names}")
    return folders[0]


def _fingerprint(settings: dict[str, Any], sources: Sequence[Source], root: Path) -> str:
    """Return the hash of `settings` and the content of `sources`.

    Content is hashed once: the result is cached by inodes, sizes and times of the last change
    (ctime), which no program can set. A file that changed in the last seconds is hashed again,
    since it could change once more within the resolution of that time.
    """
    stats = [file.stat() for source in sources for file in source.files()]
    stamps = [[stat.st_dev, stat.st_ino, stat.st_size, stat.st_ctime_ns] for stat in stats]
    kinds = [[source.kind, source.split] for source in sources]
    known = root / "known" / _digest([settings, kinds, stamps])
    if known.is_file():
        return known.read_text()
    settled = max(stat.st_ctime for stat in stats) < time.time() - _SETTLED_SECONDS
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
def locked(file: Path, log: Callable[[str], None] | None) -> Iterator[None]:
    """Hold a lock on `file`, which is created and stays, during the block."""
    with file.open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if log is not None:
                log("data: another process is preparing the same data; waiting for it")
            fcntl.flock(stream, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def complete_folder(path: Path) -> Iterator[Path]:
    """Yield a new folder, renamed to `path` if the block succeeds and removed otherwise."""
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
    sources: Sequence[Source],
    reader: Reader,
    tokenizer: Tokenizer,
    progress: bool,
    *,
    row_length: int,
    held_out: float,
    max_tokens: int | None,
) -> dict[str, Any]:
    """Write the rows of both splits; return the fields of `PreparedInfo` that count documents."""
    index = read_index(sources, reader, progress)
    # The end of a single text is held out, which is known only when it is tokenized.
    hold_out_end = len(index.keys) == 1 and held_out < 1 and not reader.keeps_whole
    if hold_out_end:
        share, orders = held_out, {TRAIN: np.array([0]), HELD_OUT: np.array([], int)}
    else:
        orders = split_documents(index.keys, held_out)
        share = len(orders[HELD_OUT]) / len(index.keys)
    budgets = None if max_tokens is None else split_budget(share, max_tokens)
    file = folder / "tokens"
    documents = tokenize(sources, reader, index, orders, budgets, file, progress)
    if hold_out_end:
        documents = split_at_end(documents, share, tokenizer)
        orders = {TRAIN: np.array([0]), HELD_OUT: np.array([1])}
    splits, rows = {}, {}
    for split, order in orders.items():
        budget = None if budgets is None else budgets[split]
        selected = select(documents, order, budget, row_length, tokenizer)
        pieces = split_into_pieces(documents.starts[selected.order], selected.sizes, row_length)
        if not len(pieces.lengths):
            raise UserError(
                f"no example of the {split} split has tokens of an answer within"
                f" data.row_length {row_length} and data.max_tokens {max_tokens}"
                if reader.keeps_whole
                else f"no document of the {split} split has two tokens; left out:"
                f" {counted(documents.left_out)}"
            )
        members = assign_rows(pieces.lengths, row_length)
        splits[split] = SplitInfo(
            documents=len(selected.order),
            text_bytes=selected.text_bytes,
            tokens=int(selected.sizes.sum()),
            targets=int(targets_with_loss(documents, pieces).sum()),
            rows=len(members),
            long_documents=selected.long_documents,
            useful_share=int(pieces.lengths.sum()) / (len(members) * row_length),
            longest_share=longest_share(pieces.lengths, members),
        )
        rows[split] = stored_rows(documents, pieces, members, progress)
    write_tfds(folder, rows, answers=reader.keeps_whole)
    file.unlink()
    return {
        "documents": len(index.sizes) - sum(documents.left_out.values()),
        "left_out": index.left_out | documents.left_out,
        "unused_fields": index.unused_fields,
        "splits": splits,
    }
