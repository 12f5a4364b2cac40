"""Split into training and held-out documents, and the order in which a token budget selects them.

Both follow from a hash of each document's content: documents with the lowest hashes are held out,
and a token budget selects the lowest hashes of each split. The result depends neither on the order
of the sources nor on a seed, equal documents are always in the same split, and a document that is
held out under a token budget is held out of the full corpus too.
"""

import hashlib

import numpy as np
from jaxtyping import Int, UInt64

from sat_jax.errors import UserError

TRAIN, HELD_OUT = "train", "held_out"


def document_key(text: bytes) -> bytes:
    """Return the 8-byte hash of a document."""
    return hashlib.blake2b(text, digest_size=8).digest()


def split_documents(
    keys: UInt64[np.ndarray, " documents"], held_out: float
) -> dict[str, Int[np.ndarray, " selected"]]:
    """Return the documents of each split in the order of their hashes `keys`.

    `held_out` is a share of the documents if below 1, otherwise a count. At least one document is
    held out, with all its copies. Raises `UserError` if none would be left to train on.
    """
    requested = max(1, round(held_out * len(keys))) if held_out < 1 else int(held_out)
    if requested >= len(keys):
        raise UserError(
            f"held-out {held_out} leaves none of {len(keys)} documents to train on; a text file is"
            " one document, and so is a line of JSON; accepted for a single text: a share below 1"
        )
    order = np.argsort(keys, kind="stable")
    count = np.searchsorted(keys[order], keys[order[requested - 1]], "right")
    if count == len(keys):
        raise UserError(
            f"held-out {held_out} leaves nothing to train on: all documents are copies of one text"
        )
    return {TRAIN: order[count:], HELD_OUT: order[:count]}


def split_budget(share: float, tokens: int) -> dict[str, int]:
    """Divide `tokens` between the splits; the held-out split gets `share`, but at least 2."""
    held_out = min(max(2, round(tokens * share)), tokens)
    return {TRAIN: tokens - held_out, HELD_OUT: held_out}
