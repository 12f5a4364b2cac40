"""Text, tokenized and packed once: a TFDS dataset in array_record, named by what it was made from.

`<root>/<fingerprint>/` holds the rows (`packed_rows/`) and `info.json`. It is made beside its place
under a lock, and renamed when it is whole: an interrupted preparation is never taken for one.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from sat_jax.cache import cache_dir
from sat_jax.data.conversations import Conversations
from sat_jax.data.corpus import Reader, Texts, read_index, split_end, tokenize
from sat_jax.data.form import DONE, Form
from sat_jax.data.packed_rows import counted, learnt_targets, rows_of, write_tfds
from sat_jax.data.packing import assign_rows, cut
from sat_jax.data.progress import bar
from sat_jax.data.sources import Source, resolve_sources
from sat_jax.data.splits import (
    HELD_OUT,
    TRAIN,
    Index,
    budgets,
    check_held_out,
    choose_held_out,
    holds_out_end,
    sampling_order,
)
from sat_jax.data.taken import take, take_whole
from sat_jax.data.tokenizer import Tokenizer
from sat_jax.errors import UserError, why_no_folder

FORMAT = 3  # of what is written; another one is another fingerprint
_INFO = "info.json"
_UNFINISHED = ".unfinished"


@dataclass(frozen=True)
class SplitInfo:
    """What one split holds. Documents may be examples: conversations."""

    documents: int
    text_bytes: int  # UTF-8 of those documents (of examples their answers): perplexity per byte
    tokens: int  # bos and eos among them
    targets: int  # tokens that bear loss: all but the first of each document; of examples answers
    rows: int
    long_documents: int  # longer than a row: cut into several; examples are dropped or cut short
    useful_share: float  # of the rows' slots, that are not padding


@dataclass(frozen=True)
class PreparedInfo:
    """What a preparation was made from, and what came out."""

    fingerprint: str
    tokenizer: str
    vocab_size: int  # of the tokenizer
    row_length: int
    held_out: float
    max_tokens: int | None
    form: dict[str, Any]  # of the documents
    sources: list[str]
    files: int
    documents: int  # with something to learn, in all sources
    left_out: dict[str, int]  # documents, by why
    splits: dict[str, SplitInfo]


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
    form: Form = Form(),
    model_vocab_size: int | None = None,
    root: Path | None = None,
    log: Callable[[str], None] | None = None,
) -> Prepared:
    """Tokenizes and packs `sources`, or finds that this has been done: then it changes nothing.

    `sources` as in `resolve_sources`; `held_out` as in `choose_held_out`; `max_tokens` caps both
    splits together and cuts the last document it takes, but leaves out an example that it would
    have to cut; `form` says what the documents are. The result lies in `root` (default: the
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
    reader: Reader = (
        Texts(form.text_field, tokenizer)
        if form.text
        else Conversations(form, tokenizer, row_length)
    )
    root = root or cache_dir("data")
    settings = {
        "format": FORMAT,
        "tokenizer": tokenizer.fingerprint,
        "row_length": row_length,
        "held_out": float(held_out),
        "max_tokens": max_tokens,
        "reader": reader.settings,
    }
    try:
        root.mkdir(parents=True, exist_ok=True)
        fingerprint = _fingerprint(settings, files, root)
        path = root / fingerprint
        with _locked(root / f"{fingerprint}.lock", log):
            done = "already prepared" if path.exists() else "prepared"
            if done == "prepared":
                with _replacing(path) as unfinished:
                    splits, index = _write(
                        unfinished,
                        sources=files,
                        reader=reader,
                        tokenizer=tokenizer,
                        row_length=row_length,
                        held_out=held_out,
                        max_tokens=max_tokens,
                        progress=log is not None,
                    )
                    info = PreparedInfo(
                        fingerprint=fingerprint,
                        tokenizer=tokenizer.name,
                        vocab_size=tokenizer.vocab_size,
                        row_length=row_length,
                        held_out=held_out,
                        max_tokens=max_tokens,
                        form=asdict(form),
                        sources=[sources] if isinstance(sources, str) else list(sources),
                        files=len(files),
                        documents=len(index.sizes),
                        left_out=index.left_out,
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
        if not form.text:
            log(f"data: {describe_examples(prepared.info)}")
        rows = ", ".join(f"{split.rows} {name} rows" for name, split in splits.items())
        log(f"data: {done}, {rows} of {row_length} tokens in {path}")
    return prepared


def describe_examples(info: PreparedInfo) -> str:
    """What was made of the examples, in one line."""
    done = DONE[info.form["too_long"]]
    counts = {f"longer than a row ({done})": sum(s.long_documents for s in info.splits.values())}
    why = ", ".join(f"{count} {why}" for why, count in (info.left_out | counts).items() if count)
    splits = [
        f"{split.documents:,} {name} examples, loss on {split.targets:,} of {split.tokens:,} tokens"
        f" in {split.useful_share:.0%} of the slots"
        for name, split in info.splits.items()
    ]
    return "; ".join([*splits, f"not as they were: {why}" if why else "none left out"])


def load_prepared(path: Path) -> Prepared:
    """What `prepare` left in `path`, or in the only such folder in it (its `root`).

    Raises `UserError` where that is something else.
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
    reader: Reader,
    tokenizer: Tokenizer,
    row_length: int,
    held_out: float,
    max_tokens: int | None,
    progress: bool,
) -> tuple[dict[str, SplitInfo], Index]:
    """Writes the rows of both splits. Returns what they hold, and what is known of all sources."""
    index = read_index(sources, reader, progress)
    chosen = choose_held_out(index, held_out)
    orders = {TRAIN: sampling_order(index, ~chosen), HELD_OUT: sampling_order(index, chosen)}
    end = holds_out_end(index, held_out)
    share = held_out if end else float(chosen.mean())
    limits = None if max_tokens is None else budgets(share, max_tokens)
    file = folder / "tokens"
    tokens = tokenize(sources, reader, index, orders, limits, file, progress)
    if end:
        tokens = split_end(tokens, share, tokenizer)
        orders = {TRAIN: np.array([0]), HELD_OUT: np.array([1])}
    splits, rows = {}, {}
    for split, order in orders.items():
        limit = None if limits is None else limits[split]
        if index.whole:
            taken = take_whole(tokens, order, limit, row_length)
        else:
            taken = take(tokens, order, limit, row_length, tokenizer)
        pieces = cut(tokens.starts[taken.order], taken.sizes, row_length)
        if not len(pieces.lengths):
            raise UserError(
                f"no example of the {split} split fits data.row_length {row_length}"
                f" and data.max_tokens {max_tokens}"
                if index.whole
                else f"no document of the {split} split has two tokens"
            )
        row_of_piece = assign_rows(pieces.lengths, row_length)
        slots, count = int(pieces.lengths.sum()), int(row_of_piece.max()) + 1
        splits[split] = SplitInfo(
            documents=len(taken.order),
            text_bytes=taken.text_bytes,
            tokens=int(taken.sizes.sum()),
            targets=int(learnt_targets(tokens, pieces).sum()),
            rows=count,
            long_documents=taken.long_documents,
            useful_share=slots / (count * row_length),
        )
        rows[split] = rows_of(tokens, pieces, row_of_piece)
    total = sum(split.rows for split in splits.values())
    with bar("writing", " rows", progress, total) as shown:
        shown_rows = {split: counted(many, shown) for split, many in rows.items()}
        write_tfds(folder, shown_rows, answers=tokens.answers is not None)
    file.unlink()
    return splits, index
