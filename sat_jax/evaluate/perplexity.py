"""Perplexity of a model on a text, per token and per byte.

Perplexity per token compares models with the same tokenizer. Perplexity per byte and bits per byte
compare all models.
"""

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from flax import nnx
from jaxtyping import Array, Float

from sat_jax.data.batch import Batch
from sat_jax.data.batches import in_order, open_split
from sat_jax.data.prepare import load_prepared
from sat_jax.data.sources import read_documents, resolve_sources
from sat_jax.data.tokenizer import Tokenizer
from sat_jax.errors import UserError
from sat_jax.evaluate.packing import pack, row_width
from sat_jax.models.decoder_config import DecoderConfig
from sat_jax.nn.decoder import Decoder
from sat_jax.nn.loss import next_token_loss


class Score(NamedTuple):
    """The summed negative log-likelihood (natural logarithm) of `tokens` predicted tokens."""

    nll: float
    tokens: int


def perplexity(
    model: Decoder,
    batches: Iterable[Batch],
    on_batch: Callable[[int], object] = lambda _: None,
) -> Score:
    """Return the score of all tokens in the `loss_mask` of the batches; deterministic.

    Compiles once for each batch shape. `on_batch` is called with the number of predicted tokens of
    each batch. Raises `UserError` if there is no token to predict.
    """
    graph, params = nnx.split(model)
    nll, tokens = 0.0, 0
    for batch in batches:
        nll += float(_nll(graph, params, batch))
        predicted = int(batch.loss_mask.sum())
        tokens += predicted
        on_batch(predicted)
    if not tokens:
        raise UserError("no token to predict: every document has fewer than two tokens")
    return Score(nll, tokens)


@functools.partial(jax.jit, static_argnames=("graph",))
def _nll(graph: nnx.GraphDef[Decoder], params: nnx.State, batch: Any) -> Float[Array, ""]:
    model: Decoder = nnx.merge(graph, params)
    total, _ = next_token_loss(model, *batch)
    return total


class EvalData(NamedTuple):
    """A text in batches, read in windows of `length` tokens that advance by `stride` tokens."""

    batches: Iterator[Batch]
    tokens: int  # predicted tokens
    text_bytes: int
    length: int
    stride: int


def text_data(
    texts: Sequence[str], tokenizer: Tokenizer, length: int, stride: int, rows: int
) -> EvalData:
    """Return texts, one document each without an eos token, in the batches of `windows`."""
    documents = tokenizer.encode_batch(texts)
    return EvalData(
        windows(documents, length, stride, rows),
        sum(max(len(document) - 1, 0) for document in documents),
        sum(len(text.encode()) for text in texts),
        length,
        stride,
    )


def prepared_data(path: Path, split: str, config: DecoderConfig, rows: int) -> EvalData:
    """Return a split of prepared data in batches of `rows` rows; eos tokens are predicted too.

    Raises `UserError` if `path` is something else, or if its ids or its row length exceed those of
    the model.
    """
    prepared = load_prepared(path)
    if prepared.info.vocab_size > config.vocab_size:
        raise UserError(
            f"{path}: prepared with a tokenizer of {prepared.info.vocab_size} ids, but the model"
            f" has {config.vocab_size}: they do not match"
        )
    config.check_length(f"{path}: the row length", prepared.info.row_length)
    batches = in_order(open_split(prepared, split), rows)
    info = prepared.info.splits[split]
    row_length = prepared.info.row_length  # pieces of a document do not overlap
    return EvalData(batches, info.targets, info.text_bytes, row_length, row_length)


def read_text(
    sources: str | Sequence[str],
    text_field: str = "text",
    max_bytes: int | None = None,
    log: Callable[[str], None] | None = None,
) -> list[str]:
    """Return the nonempty documents of `sources` (see `resolve_sources`) up to `max_bytes` bytes.

    The last document is truncated after a complete character. `log` receives a line for each part
    of `sources` of which something is left out. Raises `UserError` for bad input.
    """
    if max_bytes is not None and max_bytes < 1:
        raise UserError(f"max bytes {max_bytes}; accepted: 1 or more")
    texts: list[str] = []
    size = 0
    for source in resolve_sources(sources, log):
        for document in read_documents(source, text_field):
            text = document.text
            if max_bytes is not None and size + len(text.encode()) > max_bytes:
                text = text.encode()[: max_bytes - size].decode(errors="ignore")
                return [*texts, text] if text else texts
            size += len(text.encode())
            if text:
                texts.append(text)
    return texts


def windows(
    documents: Sequence[Sequence[int]], length: int, stride: int, rows: int
) -> Iterator[Batch]:
    """Return batches of `rows` × `length` that predict every token of every document once.

    A document's first token is not predicted. A document is read in windows of `length` tokens that
    advance by `stride` tokens. A window predicts only tokens that no earlier window predicts;
    therefore each of them, except in the first window, has at least length - stride tokens of
    context. Windows are segments and share rows; rows are shorter if no document needs `length`.
    Raises `UserError` for invalid lengths.
    """
    if not 1 <= stride <= length:
        raise UserError(f"length {length} and stride {stride}; accepted: 1 ≤ stride ≤ length")
    if rows < 1:
        raise UserError(f"rows {rows}; accepted: 1 or more")
    sequences: list[Sequence[int]] = []
    context: list[int] = []  # inputs of each window whose targets were predicted before
    for document in documents:
        inputs = len(document) - 1
        # The last window is the first one that reaches the end of the document.
        for start in range(0, max(inputs - length, 0) + stride, stride) if inputs > 0 else ():
            sequences.append(document[start : min(start + length, inputs) + 1])
            context.append(length - stride if start else 0)
    longest = max((len(sequence) - 1 for sequence in sequences), default=0)
    packed = pack(sequences, context, row_width(longest, length), rows)
    return (batch for batch, _ in packed)
