"""Selection of the documents of a split that fit a token budget."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from sat_jax.data.corpus import TokenizedDocuments
from sat_jax.data.tokenizer import Tokenizer


class SelectedDocuments(NamedTuple):
    """The selected documents of a split, in sampling order."""

    order: Int[np.ndarray, " selected"]
    sizes: Int[np.ndarray, " selected"]  # tokens
    text_bytes: int  # UTF-8 bytes of the text that has a loss
    long_documents: int  # documents longer than a row


def select_and_truncate(
    documents: TokenizedDocuments,
    order: Int[np.ndarray, " documents"],
    budget: int | None,
    row_length: int,
    tokenizer: Tokenizer,
) -> SelectedDocuments:
    """Select documents until `budget` tokens are reached; the last one is truncated to fit.

    A budget of None selects all documents.
    """
    sizes = documents.sizes[order]
    if budget is not None:
        ends = np.cumsum(sizes)
        count = min(
            int(np.searchsorted(ends, budget)) + 1, int(np.flatnonzero(sizes).max(initial=0)) + 1
        )
        order, sizes = order[:count], sizes[:count].copy()
        sizes[-1] -= max(0, ends[count - 1] - budget)
    text_bytes = int(documents.text_bytes[order].sum())
    last = order[-1]
    if sizes[-1] < documents.sizes[last]:  # truncated: count the bytes of the remaining text
        start = documents.starts[last]
        text = tokenizer.decode(documents.ids[start : start + sizes[-1]].tolist())
        text_bytes += len(text.encode()) - int(documents.text_bytes[last])
    return SelectedDocuments(order, sizes, text_bytes, int((sizes - 1 > row_length).sum()))


def select_whole(
    documents: TokenizedDocuments,
    order: Int[np.ndarray, " documents"],
    budget: int | None,
    row_length: int,
) -> SelectedDocuments:
    """Select as many documents as fit into `budget` tokens, without truncating any.

    A document without tokens was dropped because of its length. It counts as a long document if it
    precedes the end of the selection.
    """
    if budget is not None:
        ends = np.cumsum(documents.sizes[order])
        order = order[: int(np.searchsorted(ends, budget, "right"))]
    long_documents = int((documents.original_sizes[order] - 1 > row_length).sum())
    order = order[documents.sizes[order] > 0]
    text_bytes = int(documents.text_bytes[order].sum())
    return SelectedDocuments(order, documents.sizes[order], text_bytes, long_documents)
