"""Which documents are held out, and which ones a cap on the tokens takes.

Both follow from a hash of each document's content: the lowest ones are held out, and a cap takes
the lowest of each side. Neither the order of the sources nor any seed has a part in it, equal
documents always fall on the same side, and what a capped preparation holds out is held out of the
full one too. Of a corpus of one document a share is held out by tokens: those at its end.
"""

import hashlib
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int, UInt64

from sat_jax.errors import UserError

TRAIN, HELD_OUT = "train", "held_out"


class Index(NamedTuple):
    """What is remembered of every document of a corpus, in the order in which they are read."""

    keys: UInt64[np.ndarray, " documents"]  # see `document_key`
    sizes: Int[np.ndarray, " documents"]  # bytes of UTF-8
    first: Int[np.ndarray, " sources_plus_1"]  # number of the first document of each source
    left_out: dict[str, int]  # documents that are not numbered, by why
    whole: bool  # documents are never cut


def document_key(text: bytes) -> bytes:
    """The 8 bytes that stand for a document."""
    return hashlib.blake2b(text, digest_size=8).digest()


def check_held_out(held_out: float) -> None:
    """Raises `UserError` unless `held_out` is a fraction or a whole number of documents."""
    if not held_out > 0 or (held_out >= 1 and held_out % 1 != 0):
        raise UserError(
            f"held-out {held_out}; accepted: a share between 0 and 1, or from 1 on a whole"
            " number of documents"
        )


def holds_out_end(index: Index, held_out: float) -> bool:
    """Whether there is one document only, so that a share of it is held out: its end."""
    return len(index.keys) == 1 and held_out < 1 and not index.whole


def choose_held_out(index: Index, held_out: float) -> Bool[np.ndarray, " documents"]:
    """Which documents are held out: a fraction of them below 1, that many from 1 on.

    At least one is, and every copy of it, but for `holds_out_end`: then none is. Raises `UserError`
    where none would be left to train on.
    """
    keys, count = index.keys, len(index.keys)
    if holds_out_end(index, held_out):
        return np.zeros(1, bool)
    wanted = max(1, round(held_out * count)) if held_out < 1 else int(held_out)
    if wanted >= count:
        hint = (
            ""
            if index.whole
            else "; a text file is one document, a line of JSON is one; accepted for a single one:"
            " a share below 1"
        )
        raise UserError(f"held-out {held_out} leaves none of {count} documents to train on{hint}")
    chosen = keys <= np.sort(keys)[wanted - 1]
    if chosen.all():
        raise UserError(f"held-out {held_out} leaves nothing to train on: copies of one text")
    return chosen


def sampling_order(
    index: Index, chosen: Bool[np.ndarray, " documents"]
) -> Int[np.ndarray, " chosen"]:
    """The numbers of the `chosen` documents, in the order in which a cap takes them."""
    numbers = np.flatnonzero(chosen)
    return numbers[np.argsort(index.keys[numbers], kind="stable")]


def budgets(share: float, tokens: int) -> dict[str, int]:
    """`tokens`, of which `share` are for the held-out split: two at least, which make a pair."""
    held_out = min(max(2, round(tokens * share)), tokens)
    return {TRAIN: tokens - held_out, HELD_OUT: held_out}
