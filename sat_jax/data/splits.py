"""Split into training and held-out documents, and the order in which a token budget selects them.

Both follow from a hash of each document's content: documents with the lowest hashes are held out,
and a token budget selects the lowest hashes of each split. The result depends neither on the order
of the sources nor on a seed, equal documents are always in the same split, and a document that is
held out under a token budget is held out of the full corpus too. If a corpus has one document, its
last tokens are held out.
"""

import hashlib
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int, UInt64

from sat_jax.errors import UserError

TRAIN, HELD_OUT = "train", "held_out"


class Index(NamedTuple):
    """Hash and size of every document of a corpus, in reading order."""

    keys: UInt64[np.ndarray, " documents"]  # see `document_key`
    sizes: Int[np.ndarray, " documents"]  # UTF-8 bytes
    first: Int[np.ndarray, " sources_plus_1"]  # number of the first document of each source
    left_out: dict[str, int]  # skipped documents, which have no number, by reason
    keeps_whole: bool  # documents are never truncated


def document_key(text: bytes) -> bytes:
    """Return the 8-byte hash of a document."""
    return hashlib.blake2b(text, digest_size=8).digest()


def check_held_out(held_out: float) -> None:
    """Raise `UserError` unless `held_out` is a fraction or a whole number of documents."""
    if not held_out > 0 or (held_out >= 1 and held_out % 1 != 0):
        raise UserError(
            f"held-out {held_out}; accepted: a share between 0 and 1, or a whole number of"
            " documents, 1 or more"
        )


def holds_out_end(index: Index, held_out: float) -> bool:
    """Return whether the end of the only document is held out."""
    return len(index.keys) == 1 and held_out < 1 and not index.keeps_whole


def choose_held_out(index: Index, held_out: float) -> Bool[np.ndarray, " documents"]:
    """Return which documents are held out: a fraction of them if below 1, otherwise a count.

    At least one is held out, with all its copies; none in the case of `holds_out_end`. Raises
    `UserError` if no document would be left to train on.
    """
    keys, count = index.keys, len(index.keys)
    if holds_out_end(index, held_out):
        return np.zeros(1, bool)
    requested = max(1, round(held_out * count)) if held_out < 1 else int(held_out)
    if requested >= count:
        hint = (
            ""
            if index.keeps_whole
            else "; a text file is one document, and so is a line of JSON; accepted for a single"
            " document: a share below 1"
        )
        raise UserError(f"held-out {held_out} leaves none of {count} documents to train on{hint}")
    held_out_mask = keys <= np.sort(keys)[requested - 1]
    if held_out_mask.all():
        raise UserError(
            f"held-out {held_out} leaves nothing to train on: all documents are copies of one text"
        )
    return held_out_mask


def sampling_order(
    index: Index, selected: Bool[np.ndarray, " documents"]
) -> Int[np.ndarray, " selected"]:
    """Return the numbers of the `selected` documents in the order of their hashes."""
    numbers = np.flatnonzero(selected)
    return numbers[np.argsort(index.keys[numbers], kind="stable")]


def split_budget(share: float, tokens: int) -> dict[str, int]:
    """Divide `tokens` between the splits; the held-out split gets `share`, but at least 2."""
    held_out = min(max(2, round(tokens * share)), tokens)
    return {TRAIN: tokens - held_out, HELD_OUT: held_out}
