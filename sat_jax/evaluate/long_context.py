"""Perplexity against context length and against position, from sliding windows.

Source: Press et al. (arXiv:2108.12409), sections 2 and B.2; the evaluation published with YaRN
(arXiv:2309.00071).
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from flax import nnx
from jaxtyping import Float

from sat_jax.errors import UserError
from sat_jax.evaluate.likelihood import slot_scores
from sat_jax.evaluate.perplexity import windows
from sat_jax.nn.decoder import Decoder


class ContextScore(NamedTuple):
    """Negative log-likelihoods (nll, natural logarithm) of one context length.

    `nll` is summed over `tokens`, each of which is predicted once. `window_nll` is the mean over
    `windows` of the mean nll of the tokens that each window predicts. `position_nll` is the mean
    nll at each position, over the `full_windows`, those of `context` tokens; it counts all tokens
    of a window, also those that an earlier window has predicted.
    """

    nll: float
    tokens: int
    window_nll: float
    windows: int
    position_nll: Float[np.ndarray, " context"]
    full_windows: int


def long_documents(documents: Sequence[Sequence[int]], context: int) -> list[Sequence[int]]:
    """Return the documents with more than `context` tokens. Raises `UserError` if there are none.

    Others would have the same perplexity at this context length as at a shorter one.
    """
    result = [document for document in documents if len(document) > context]
    if not result:
        longest = max(map(len, documents), default=0)
        raise UserError(
            f"context {context}: the longest document has {longest} tokens; accepted:"
            " contexts shorter than a document"
        )
    return result


def score_context(
    model: Decoder,
    documents: Sequence[Sequence[int]],
    context: int,
    stride: int,
    rows: int,
    on_batch: Callable[[int], object] = lambda _: None,
) -> ContextScore:
    """Return the score of `documents` in windows of `context` tokens that advance by `stride`.

    The windows are those of `perplexity.windows`. `on_batch` is called with the number of predicted
    tokens of each batch. Raises `UserError` for invalid lengths and if no window is full.
    """
    batches = windows(long_documents(documents, context), context, stride, rows)
    graph, params = nnx.split(model)
    sums: list[np.ndarray] = []  # nll of each window
    counts: list[np.ndarray] = []  # tokens that each window predicts
    position_nll, full_windows = np.zeros(context), 0
    for batch in batches:
        nll = -np.asarray(slot_scores(graph, params, batch)[0], np.float64)
        first = np.arange(rows)[:, None] * batch.segment_ids.max()
        window = np.where(batch.segment_ids > 0, batch.segment_ids + first, 0)  # 0: padding
        scored = window[batch.loss_mask]
        predicted = np.bincount(scored)
        sums.append(np.bincount(scored, nll[batch.loss_mask])[predicted > 0])
        counts.append(predicted[predicted > 0])
        full = (np.bincount(window.ravel()) == context)[window] & (window > 0)
        position_nll += np.bincount(batch.positions[full], nll[full], minlength=context)
        full_windows += int(full.sum()) // context
        on_batch(int(batch.loss_mask.sum()))
    window_sums, window_counts = np.concatenate(sums), np.concatenate(counts)
    return ContextScore(
        float(window_sums.sum()),
        int(window_counts.sum()),
        float((window_sums / window_counts).mean()),
        len(window_sums),
        position_nll / full_windows,
        full_windows,
    )
