"""A corpus, read twice and never held: to know its documents, and to tokenize the chosen ones."""

from array import array
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Int, Int32

from sat_jax.data.progress import bar
from sat_jax.data.sources import Source, read_documents
from sat_jax.data.splits import Index, budgets, document_key
from sat_jax.data.tokenizer import Tokenizer
from sat_jax.errors import UserError

_BATCH = 1 << 20  # bytes of text that are tokenized at once, in all threads
# English takes 4 to 5 bytes a token and code 3. Too high a guess tokenizes more than a cap needs,
# too low a one reads the corpus once more.
_BYTES_PER_TOKEN = 4.0


class Tokens(NamedTuple):
    """The tokens of some documents of a corpus, on disk."""

    flat: Int32[np.ndarray, " tokens"]  # memory-mapped
    starts: Int[np.ndarray, " documents"]
    sizes: Int[np.ndarray, " documents"]  # 0 for a document that was not chosen


def read_index(sources: Sequence[Source], text_field: str, progress: bool) -> Index:
    """Reads every document once. Raises `UserError` for bad input and where there is no text."""
    keys, sizes, first, empty = bytearray(), array("q"), [0], 0
    with bar("reading", " documents", progress) as shown:
        for source in sources:
            for document in read_documents(source, text_field):
                if not document.text:
                    empty += 1
                    continue
                text = document.text.encode()
                keys += document_key(text)
                sizes.append(len(text))
                shown.update()
            first.append(len(sizes))
    if not sizes:
        raise UserError(f"no documents left: all {empty} in the sources are empty")
    return Index(
        keys=np.frombuffer(keys, np.uint64),
        sizes=np.array(sizes, np.int64),
        first=np.array(first),
        empty=empty,
    )


def tokenize(
    sources: Sequence[Source],
    text_field: str,
    index: Index,
    orders: Mapping[str, Int[np.ndarray, " chosen"]],
    limits: Mapping[str, int] | None,
    tokenizer: Tokenizer,
    file: Path,
    progress: bool,
) -> Tokens:
    """Tokenizes documents into `file`: of each split's order as many as fill its limit, or all.

    Only about as much text as the limits need is tokenized, guessed first and then measured.
    """
    starts, sizes = np.zeros_like(index.sizes), np.zeros_like(index.sizes)
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
            texts = _read(sources, text_field, index, numbers)
            total = int(index.sizes[numbers].sum())
            with bar("tokenizing", "B", progress, total) as shown:
                for batch in _batched(texts):
                    documents = tokenizer.encode_documents([text for _, text in batch])
                    for (number, _), ids in zip(batch, documents, strict=True):
                        np.array(ids, np.int32).tofile(stream)
                        starts[number], sizes[number] = end, len(ids)
                        end += len(ids)
                        shown.update(int(index.sizes[number]))
            ratio = 1.1 * float(index.sizes[sizes > 0].sum()) / max(end, 1)
    if not end:
        raise UserError("the tokenizer makes no tokens of these documents")
    return Tokens(np.memmap(file, np.int32, mode="r"), starts, sizes)


def split_end(
    tokens: Tokens, text_bytes: int, share: float, tokenizer: Tokenizer
) -> tuple[Tokens, Int[np.ndarray, " 2"]]:
    """The one document of `tokens` as two, the second its last `share`; and the bytes of both."""
    (total,) = tokens.sizes
    sizes = np.array(list(budgets(share, int(total)).values()))
    end = tokens.flat[sizes[0] :].tolist()
    if end[-1] == tokenizer.eos_id:
        end.pop()
    held_out = min(len(tokenizer.decode(end).encode()), text_bytes)
    starts = np.array([0, sizes[0]])
    return Tokens(tokens.flat, starts, sizes), np.array([text_bytes - held_out, held_out])


def _read(
    sources: Sequence[Source], text_field: str, index: Index, numbers: Int[np.ndarray, " wanted"]
) -> Iterator[tuple[int, str]]:
    """The documents of the sorted `numbers`; sources that have none of them are not opened."""
    for source, first, last in zip(sources, index.first[:-1], index.first[1:], strict=True):
        here = numbers[slice(*np.searchsorted(numbers, (first, last)))].tolist()
        if not here:
            continue
        wanted = set(here)
        number = int(first)
        for document in read_documents(source, text_field):
            if not document.text:
                continue
            if number in wanted:
                if document_key(document.text.encode()) != index.keys[number].tobytes():
                    break
                wanted.remove(number)
                yield number, document.text
                if not wanted:
                    break
            number += 1
        if wanted:
            raise UserError(f"{source}: changed while it was being read")


def _batched(texts: Iterator[tuple[int, str]]) -> Iterator[list[tuple[int, str]]]:
    batch, size = [], 0
    for number, text in texts:
        batch.append((number, text))
        size += len(text)
        if size >= _BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
