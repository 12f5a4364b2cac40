"""Reading of a corpus as a stream: one pass to index it, further ones to tokenize a selection."""

from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int, Int32, UInt64
from tqdm import tqdm

from sat_jax.data.sources import Document, Source, counted, read_documents
from sat_jax.data.splits import document_key, split_budget
from sat_jax.data.tokenizer import Tokenizer
from sat_jax.errors import UserError

_BATCH = 1 << 20  # characters of text that are tokenized at once, by all threads
# English has 4 to 5 bytes per token, code has 3. Too high an estimate tokenizes more than the
# budget needs, too low an estimate reads the corpus again.
_BYTES_PER_TOKEN = 4.0
_MAX_FIELDS = 20  # names of unused fields that are stored: data may have a name per document


class Encoded(NamedTuple):
    """The tokens of a document."""

    ids: list[int]
    answer_spans: list[tuple[int, int]] | None  # spans of ids with a loss; None: all have one
    text_bytes: int  # UTF-8 bytes of the text that has a loss
    original_size: int  # tokens before the document was truncated or dropped
    skip_reason: str = ""  # why it has no tokens, unless it is longer than a row


@dataclass(frozen=True)
class Reader:
    """How the documents of a corpus are read and encoded."""

    settings: dict[str, Any]  # everything that determines the tokens, except the tokenizer
    read: Callable[[Source], Iterator[Document]]  # also yields documents that are skipped
    encode: Callable[[Sequence[Document]], list[Encoded]]
    keeps_whole: bool  # never truncates a document for a token budget or the held-out share


def text_reader(text_field: str, tokenizer: Tokenizer, min_tokens: int | None = None) -> Reader:
    """Return the reader of plain text: every token has a loss. Documents of fewer than `min_tokens`
    are left out."""

    def encode(documents: Sequence[Document]) -> list[Encoded]:
        texts = [document.text for document in documents]
        return [
            Encoded([], None, 0, len(ids), f"fewer than {min_tokens} tokens")
            if min_tokens is not None and len(ids) < min_tokens
            else Encoded(ids, None, len(text.encode()), len(ids))
            for text, ids in zip(texts, tokenizer.encode_documents(texts), strict=True)
        ]

    read = partial(read_documents, text_field=text_field)
    settings: dict[str, Any] = {"text_field": text_field}
    if min_tokens is not None:  # data without it keep their fingerprint
        settings["min_document_tokens"] = min_tokens
    return Reader(settings, read, encode, keeps_whole=False)


class Index(NamedTuple):
    """Hash and size of every document of a corpus, in reading order."""

    keys: UInt64[np.ndarray, " documents"]  # see `document_key`
    sizes: Int[np.ndarray, " documents"]  # UTF-8 bytes
    first: Int[np.ndarray, " sources_plus_1"]  # number of the first document of each source
    left_out: dict[str, int]  # skipped documents, which have no number, by reason
    unused_fields: dict[str, int]  # number of documents with a field that is not read, by name


class TokenizedDocuments(NamedTuple):
    """The tokens of selected documents of a corpus, stored on disk."""

    ids: Int32[np.ndarray, " tokens"]  # memory-mapped
    starts: Int[np.ndarray, " documents"]
    sizes: Int[np.ndarray, " documents"]  # 0 for a document that was not selected or was dropped
    answer_spans: Int[np.ndarray, "spans 2"] | None  # in `ids`, in order; None: all have a loss
    text_bytes: Int[np.ndarray, " documents"]  # UTF-8 bytes of the text that has a loss
    original_sizes: Int[np.ndarray, " documents"]  # before documents were truncated or dropped
    left_out: dict[str, int]  # documents without tokens, by the `skip_reason` of `Encoded`


def progress_bar(
    description: str,
    unit: str,
    enabled: bool,
    total: int | None = None,
    values: Iterable[Any] | None = None,
) -> tqdm:
    """Return a bar that appears after half a second, so that quick work and errors show none."""
    return tqdm(
        values,
        desc=description,
        unit=unit,
        unit_scale=True,
        total=total,
        delay=0.5,
        leave=False,
        disable=not enabled,
    )


def read_index(sources: Sequence[Source], reader: Reader, progress: bool) -> Index:
    """Read every document once. Raises `UserError` for bad input and if no document has text."""
    keys, sizes, first = bytearray(), array("q"), [0]
    left_out: Counter[str] = Counter()
    unused_fields: Counter[str] = Counter()
    with progress_bar("reading", " documents", progress) as bar:
        for source in sources:
            for document in reader.read(source):
                if not document.text:
                    left_out[document.skip_reason] += 1
                    continue
                unused_fields.update(document.unused_fields)
                text = document.text.encode()
                keys += document_key(text)
                sizes.append(len(text))
                bar.update()
            first.append(len(sizes))
    if not sizes:
        raise UserError(f"no document of the sources can be used: {counted(left_out)}")
    return Index(
        np.frombuffer(keys, np.uint64),
        np.array(sizes, np.int64),
        np.array(first),
        dict(left_out),
        dict(unused_fields.most_common(_MAX_FIELDS)),
    )


def tokenize(
    sources: Sequence[Source],
    reader: Reader,
    index: Index,
    orders: Mapping[str, Int[np.ndarray, " selected"]],
    budgets: Mapping[str, int] | None,
    file: Path,
    progress: bool,
) -> TokenizedDocuments:
    """Tokenize documents into `file`, from each split's order until its token budget is reached.

    `budgets` None tokenizes all documents. Each pass selects documents by an estimate of the bytes
    per token, which the next pass replaces by the measured ratio.
    """
    starts, sizes, text_bytes, original_sizes = (np.zeros_like(index.sizes) for _ in range(4))
    answer_spans = array("q")
    left_out: Counter[str] = Counter()
    done = dict.fromkeys(orders, 0)  # documents of each order that are tokenized
    end, read, bytes_per_token = 0, 0, _BYTES_PER_TOKEN
    with file.open("wb") as stream:
        while True:
            selected = []
            for split, order in orders.items():
                remaining = order[done[split] :]
                if budgets is not None:
                    missing = budgets[split] - sizes[order[: done[split]]].sum()
                    byte_sums = np.cumsum(index.sizes[remaining])
                    count = np.searchsorted(byte_sums, missing * bytes_per_token) + 1
                    remaining = remaining[: count if missing > 0 else 0]
                selected.append(remaining)
                done[split] += len(remaining)
            numbers = np.sort(np.concatenate(selected))
            if not len(numbers):
                break
            total = int(index.sizes[numbers].sum())
            read += total
            with progress_bar("tokenizing", "B", progress, total) as bar:
                for batch in _batches(_read_selected(sources, reader, index, numbers)):
                    encodings = reader.encode([document for _, document in batch])
                    for (number, _), encoded in zip(batch, encodings, strict=True):
                        np.array(encoded.ids, np.int32).tofile(stream)
                        for first, last in encoded.answer_spans or ():
                            answer_spans.extend((end + first, end + last))
                        starts[number], sizes[number] = end, len(encoded.ids)
                        text_bytes[number] = encoded.text_bytes
                        original_sizes[number] = encoded.original_size
                        left_out.update(filter(None, [encoded.skip_reason]))
                        end += len(encoded.ids)
                        bar.update(int(index.sizes[number]))
            bytes_per_token = 1.1 * read / max(end, 1)  # with the bytes of what is left out
    if not end:
        reasons = dict(left_out)
        if reader.keeps_whole:
            longer = "longer than a row (use a larger data.row_length, or data.too_long 'cut_end')"
            reasons[longer] = len(index.sizes) - sum(left_out.values())
        raise UserError(
            f"no example can be used: {counted(reasons)}"
            if reasons
            else "the tokenizer returns no tokens for these documents"
        )
    ids = np.memmap(file, np.int32, mode="r")
    spans = np.array(answer_spans, np.int64).reshape(-1, 2) if reader.keeps_whole else None
    return TokenizedDocuments(ids, starts, sizes, spans, text_bytes, original_sizes, dict(left_out))


def split_at_end(
    documents: TokenizedDocuments, share: float, tokenizer: Tokenizer
) -> TokenizedDocuments:
    """Split the only document into two; the second one is the last `share` of its tokens."""
    (total,), (text_bytes,) = documents.sizes, documents.text_bytes
    sizes = np.array(list(split_budget(share, int(total)).values()))
    end = documents.ids[sizes[0] :].tolist()
    if end[-1] == tokenizer.eos_id:
        end.pop()
    held_out = min(len(tokenizer.decode(end).encode()), text_bytes)
    return documents._replace(
        starts=np.array([0, sizes[0]]),
        sizes=sizes,
        text_bytes=np.array([text_bytes - held_out, held_out]),
        original_sizes=sizes,
    )


def _read_selected(
    sources: Sequence[Source], reader: Reader, index: Index, numbers: Int[np.ndarray, " selected"]
) -> Iterator[tuple[int, Document]]:
    """Yield the documents with these `numbers`, without opening sources that have none."""
    for source, first, last in zip(sources, index.first[:-1], index.first[1:], strict=True):
        missing = set(numbers[(numbers >= first) & (numbers < last)].tolist())
        if not missing:
            continue
        documents = (document for document in reader.read(source) if document.text)
        for number, document in enumerate(documents, int(first)):
            if number in missing:
                if document_key(document.text.encode()) != index.keys[number].tobytes():
                    break
                missing.remove(number)
                yield number, document
        if missing:
            raise UserError(f"{source}: changed while it was being read")


def _batches(documents: Iterator[tuple[int, Document]]) -> Iterator[list[tuple[int, Document]]]:
    batch, size = [], 0
    for number, document in documents:
        batch.append((number, document))
        size += len(document.text)
        if size >= _BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
