"""What a cap on the tokens takes of a split."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from sat_jax.data.corpus import Tokens
from sat_jax.data.tokenizer import Tokenizer


class Taken(NamedTuple):
    """The documents of a split, in the order in which a cap takes them."""

    order: Int[np.ndarray, " taken"]
    sizes: Int[np.ndarray, " taken"]  # tokens
    text_bytes: int  # UTF-8 of what is learnt
    long_documents: int  # longer than a row


def take(
    tokens: Tokens,
    order: Int[np.ndarray, " documents"],
    budget: int | None,
    row_length: int,
    tokenizer: Tokenizer,
) -> Taken:
    """As many of the documents as fill `budget` tokens, the last one cut to fit; None: all."""
    sizes = tokens.sizes[order]
    if budget is not None:
        ends = np.cumsum(sizes)
        count = min(
            int(np.searchsorted(ends, budget)) + 1, int(np.flatnonzero(sizes).max(initial=0)) + 1
        )
        order, sizes = order[:count], sizes[:count].copy()
        sizes[-1] -= max(0, ends[count - 1] - budget)
    text_bytes = int(tokens.text_bytes[order].sum())
    last = order[-1]
    if sizes[-1] < tokens.sizes[last]:  # cut: count what is left of its text
        start = tokens.starts[last]
        text = tokenizer.decode(tokens.flat[start : start + sizes[-1]].tolist())
        text_bytes += len(text.encode()) - int(tokens.text_bytes[last])
    return Taken(order, sizes, text_bytes, int((sizes - 1 > row_length).sum()))


def take_whole(
    tokens: Tokens, order: Int[np.ndarray, " documents"], budget: int | None, row_length: int
) -> Taken:
    """As many of the documents as `budget` tokens hold, none cut; those without tokens have been
    dropped, and count as long where they stand among the others."""
    ends = np.cumsum(tokens.sizes[order])
    if budget is not None:
        order = order[: int(np.searchsorted(ends, budget, "right"))]
    long = int((tokens.uncut[order] - 1 > row_length).sum())
    order = order[tokens.sizes[order] > 0]
    return Taken(order, tokens.sizes[order], int(tokens.text_bytes[order].sum()), long)
