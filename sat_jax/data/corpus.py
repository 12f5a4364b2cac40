"""A corpus, read twice and never held: to know its documents, and to tokenize the chosen ones."""

from array import array
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from jaxtyping import Int, Int32

from sat_jax.data.progress import bar
from sat_jax.data.sources import Document, Source, read_documents
from sat_jax.data.splits import Index, budgets, document_key
from sat_jax.data.tokenizer import Tokenizer
from sat_jax.errors import UserError

_BATCH = 1 << 20  # bytes of text that are tokenized at once, in all threads
# English takes 4 to 5 bytes a token and code 3. Too high a guess tokenizes more than a cap needs,
# too low a one reads the corpus once more.
_BYTES_PER_TOKEN = 4.0


class Encoded(NamedTuple):
    """The tokens of a document."""

    ids: list[int]
    answers: list[tuple[int, int]] | None  # runs of ids that bear loss; None: all of them do
    text_bytes: int  # UTF-8 of what is learnt
    size: int  # tokens before it was cut or dropped


class Reader(Protocol):
    """How the documents of a corpus are read and encoded."""

    whole: bool  # whether a document is never cut: not by a row's end, a cap or the held-out share

    @property
    def settings(self) -> dict[str, Any]:
        """All that decides which tokens a document gets, but for the tokenizer's ids."""

    def read(self, source: Source) -> Iterator[Document]:
        """The documents of one source; one without text is left out."""

    def encode(self, documents: Sequence[Document]) -> list[Encoded]:
        """Their tokens."""


class Texts:
    """Documents of plain text: every token is learnt."""

    whole = False

    def __init__(self, text_field: str, tokenizer: Tokenizer):
        self._text_field, self._tokenizer = text_field, tokenizer

    @property
    def settings(self) -> dict[str, Any]:
        """See `Reader`."""
        return {"text_field": self._text_field}

    def read(self, source: Source) -> Iterator[Document]:
        """See `Reader`."""
        return read_documents(source, self._text_field)

    def encode(self, documents: Sequence[Document]) -> list[Encoded]:
        """See `Reader`."""
        texts = [document.text for document in documents]
        coded = self._tokenizer.encode_documents(texts)
        return [
            Encoded(ids, None, len(text.encode()), len(ids))
            for text, ids in zip(texts, coded, strict=True)
        ]


class Tokens(NamedTuple):
    """The tokens of some documents of a corpus, on disk."""

    flat: Int32[np.ndarray, " tokens"]  # memory-mapped
    starts: Int[np.ndarray, " documents"]
    sizes: Int[np.ndarray, " documents"]  # 0 for one that was not chosen, or was dropped
    answers: Int[np.ndarray, "runs 2"] | None  # of `flat`, in order; None: every token bears loss
    text_bytes: Int[np.ndarray, " documents"]  # UTF-8 of what is learnt
    uncut: Int[np.ndarray, " documents"]  # sizes before documents were cut or dropped


def read_index(sources: Sequence[Source], reader: Reader, progress: bool) -> Index:
    """Reads every document once. Raises `UserError` for bad input and where there is no text."""
    keys, sizes, first = bytearray(), array("q"), [0]
    left_out: Counter[str] = Counter()
    with bar("reading", " documents", progress) as shown:
        for source in sources:
            for document in reader.read(source):
                if not document.text:
                    left_out[document.why] += 1
                    continue
                text = document.text.encode()
                keys += document_key(text)
                sizes.append(len(text))
                shown.update()
            first.append(len(sizes))
    if not sizes:
        why = ", ".join(f"{count} {why}" for why, count in left_out.items())
        raise UserError(f"no documents left in the sources: {why}")
    return Index(
        keys=np.frombuffer(keys, np.uint64),
        sizes=np.array(sizes, np.int64),
        first=np.array(first),
        left_out=dict(left_out),
        whole=reader.whole,
    )


def tokenize(
    sources: Sequence[Source],
    reader: Reader,
    index: Index,
    orders: Mapping[str, Int[np.ndarray, " chosen"]],
    limits: Mapping[str, int] | None,
    file: Path,
    progress: bool,
) -> Tokens:
    """Tokenizes documents into `file`: of each split's order as many as fill its limit, or all.

    Only about as much text as the limits need is tokenized, guessed first and then measured.
    """
    starts, sizes, text_bytes, uncut = (np.zeros_like(index.sizes) for _ in range(4))
    answers = array("q")
    done = dict.fromkeys(orders, 0)
    end, ratio = 0, _BYTES_PER_TOKEN
    with file.open("wb") as stream:
        while True:
            wanted = []
            for split, order in orders.items():
                ahead = order[done[split] :]
                if limits is not None:
                    missing = limits[split] - sizes[order[: done[split]]].sum()
                    enough = np.searchsorted(np.cumsum(index.sizes[ahead]), missing * ratio) + 1
                    ahead = ahead[: enough if missing > 0 else 0]
                wanted.append(ahead)
                done[split] += len(ahead)
            numbers = np.sort(np.concatenate(wanted))
            if not len(numbers):
                break
            documents = _read(sources, reader, index, numbers)
            total = int(index.sizes[numbers].sum())
            with bar("tokenizing", "B", progress, total) as shown:
                for batch in _batched(documents):
                    encoded = reader.encode([document for _, document in batch])
                    for (number, _), code in zip(batch, encoded, strict=True):
                        np.array(code.ids, np.int32).tofile(stream)
                        for run in code.answers or ():
                            answers.extend((end + run[0], end + run[1]))
                        starts[number], sizes[number] = end, len(code.ids)
                        text_bytes[number], uncut[number] = code.text_bytes, code.size
                        end += len(code.ids)
                        shown.update(int(index.sizes[number]))
            ratio = 1.1 * float(index.sizes[sizes > 0].sum()) / max(end, 1)
    if not end:
        raise UserError(
            f"all {len(index.sizes)} examples are longer than a row; accepted: a larger"
            " data.row_length, or data.too_long 'cut_end'"
            if reader.whole
            else "the tokenizer makes no tokens of these documents"
        )
    runs = np.array(answers, np.int64).reshape(-1, 2) if reader.whole else None
    return Tokens(np.memmap(file, np.int32, mode="r"), starts, sizes, runs, text_bytes, uncut)


def split_end(tokens: Tokens, share: float, tokenizer: Tokenizer) -> Tokens:
    """The one document of `tokens` as two, the second its last `share`."""
    (total,), (text_bytes,) = tokens.sizes, tokens.text_bytes
    sizes = np.array(list(budgets(share, int(total)).values()))
    end = tokens.flat[sizes[0] :].tolist()
    if end[-1] == tokenizer.eos_id:
        end.pop()
    held_out = min(len(tokenizer.decode(end).encode()), text_bytes)
    starts, byte_sizes = np.array([0, sizes[0]]), np.array([text_bytes - held_out, held_out])
    return Tokens(tokens.flat, starts, sizes, None, byte_sizes, sizes)


def _read(
    sources: Sequence[Source], reader: Reader, index: Index, numbers: Int[np.ndarray, " wanted"]
) -> Iterator[tuple[int, Document]]:
    """The documents of the sorted `numbers`; sources that have none of them are not opened."""
    for source, first, last in zip(sources, index.first[:-1], index.first[1:], strict=True):
        here = numbers[slice(*np.searchsorted(numbers, (first, last)))].tolist()
        if not here:
            continue
        wanted = set(here)
        number = int(first)
        for document in reader.read(source):
            if not document.text:
                continue
            if number in wanted:
                if document_key(document.text.encode()) != index.keys[number].tobytes():
                    break
                wanted.remove(number)
                yield number, document
                if not wanted:
                    break
            number += 1
        if wanted:
            raise UserError(f"{source}: changed while it was being read")


def _batched(documents: Iterator[tuple[int, Document]]) -> Iterator[list[tuple[int, Document]]]:
    batch, size = [], 0
    for number, document in documents:
        batch.append((number, document))
        size += len(document.text)
        if size >= _BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
