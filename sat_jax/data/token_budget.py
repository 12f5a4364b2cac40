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
    long_documents: int  # longer than a row, with the conversations that were dropped for it


def select(
    documents: TokenizedDocuments,
    order: Int[np.ndarray, " documents"],
    budget: int | None,
    row_length: int,
    tokenizer: Tokenizer,
) -> SelectedDocuments:
    """Select documents in `order` until `budget` tokens are reached; None selects all.

    The last text is truncated to fit. Conversations, which have answer spans, are never truncated.
    """
    sizes = documents.sizes[order]
    ends = np.cumsum(sizes)
    if documents.answer_spans is not None:
        fits = ends <= (ends[-1] if budget is None else budget)
        order, sizes = order[fits], sizes[fits]
        lengths = documents.original_sizes[order]
    else:
        if budget is not None:
            sizes = np.clip(budget - (ends - sizes), 0, sizes)
        lengths = sizes
    long_documents = int((lengths - 1 > row_length).sum())
    order, sizes = order[sizes > 0], sizes[sizes > 0]
    text_bytes = int(documents.text_bytes[order].sum())
    truncated = sizes < documents.sizes[order]
    for number, size in zip(order[truncated], sizes[truncated], strict=True):
        start = documents.starts[number]
        text = tokenizer.decode(documents.ids[start : start + size].tolist())
        text_bytes += len(text.encode()) - int(documents.text_bytes[number])
    return SelectedDocuments(order, sizes, text_bytes, long_documents)
