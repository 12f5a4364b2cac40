"""How well a model predicts a text: perplexity, per token and per byte.

Perplexities per token compare models with one tokenizer; per byte, and as bits per byte, they
compare any two.
"""

import functools
import math
from collections.abc import Iterable, Iterator, Sequence
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
from sat_jax.evaluate.rows import pack, row_width
from sat_jax.models.decoder_config import DecoderConfig
from sat_jax.nn.decoder import Decoder
from sat_jax.nn.loss import perplexity_of


class Score(NamedTuple):
    """The negative log-likelihood (natural logarithm) of `tokens` predicted tokens, summed."""

    nll: float
    tokens: int

    def per(self, count: int) -> float:
        """Perplexity per whatever there were `count` of: tokens, or bytes of UTF-8."""
        return perplexity_of(self.nll / count)

    def bits_per(self, count: int) -> float:
        """The same as bits: what an ideal compressor would need."""
        return self.nll / count / math.log(2)


def perplexity(model: Decoder, batches: Iterable[Batch]) -> Score:
    """The score of every token that the batches' `loss_mask` lets in. The same call, the same bits.

    Compiles once for each shape of batch. Raises `UserError` if there is no token to predict.
    """
    graph, params = nnx.split(model)
    nll, tokens = 0.0, 0
    for batch in batches:
        nll += float(_nll(graph, params, batch))
        tokens += int(batch.loss_mask.sum())
    if not tokens:
        raise UserError("no token to predict: every document has less than two")
    return Score(nll, tokens)


@functools.partial(jax.jit, static_argnames=("graph",))
def _nll(graph: nnx.GraphDef[Decoder], params: nnx.State, batch: Any) -> Float[Array, ""]:
    model: Decoder = nnx.merge(graph, params)
    total, _ = model.loss(*batch)
    return total


class Data(NamedTuple):
    """What is evaluated: its batches, the tokens they predict, the bytes of all its text, and how
    it is read: in windows of `length` tokens, each `stride` further on."""

    batches: Iterator[Batch]
    tokens: int
    text_bytes: int
    length: int
    stride: int


def text_data(
    texts: Sequence[str], tokenizer: Tokenizer, length: int, stride: int, rows: int
) -> Data:
    """Texts as `windows` reads them, one document each, without a token that ends it."""
    documents = tokenizer.encode_batch(texts)
    return Data(
        windows(documents, length, stride, rows),
        sum(max(len(document) - 1, 0) for document in documents),
        sum(len(text.encode()) for text in texts),
        length,
        stride,
    )


def prepared_data(path: Path, split: str, config: DecoderConfig, rows: int) -> Data:
    """A split of prepared data, in its rows, `rows` at a time; the ends of documents are predicted.

    Raises `UserError` where `path` is something else, or has ids or rows that the model of `config`
    does not reach.
    """
    prepared = load_prepared(path)
    if prepared.info.vocab_size > config.vocab_size:
        raise UserError(
            f"{path}: prepared with a tokenizer of {prepared.info.vocab_size} ids, but the model"
            f" has {config.vocab_size}: they do not belong together"
        )
    config.check_length(f"{path}: the row length", prepared.info.row_length)
    batches = in_order(open_split(prepared, split), rows)
    info = prepared.info.splits[split]
    row_length = prepared.info.row_length  # pieces of a document do not overlap
    return Data(batches, info.targets, info.text_bytes, row_length, row_length)


def read_text(
    sources: str | Sequence[str], text_field: str = "text", max_bytes: int | None = None
) -> list[str]:
    """The documents with text in `sources` (see `resolve_sources`), the first `max_bytes` of them.

    The last document is cut after a whole character. Raises `UserError` for bad input.
    """
    if max_bytes is not None and max_bytes < 1:
        raise UserError(f"max bytes {max_bytes}; accepted: 1 or more")
    texts: list[str] = []
    taken = 0
    for source in resolve_sources(sources):
        for document in read_documents(source, text_field):
            text = document.text
            if max_bytes is not None and taken + len(text.encode()) > max_bytes:
                text = text.encode()[: max_bytes - taken].decode(errors="ignore")
                return [*texts, text] if text else texts
            taken += len(text.encode())
            if text:
                texts.append(text)
    return texts


def windows(
    documents: Sequence[Sequence[int]], length: int, stride: int, rows: int
) -> Iterator[Batch]:
    """Batches of `rows` × `length` in which every token of every document is predicted once.

    But for a document's first token, which nothing precedes. A document is read in windows of
    `length` tokens, each `stride` further: the first predicts all it can, every other only what no
    window before it has, so that with stride < length each of those has length - stride tokens or
    more of context. With stride = length windows do not overlap. Windows share rows as segments of
    their own; rows are shorter where no document needs their length. Raises `UserError` for lengths
    that make no sense.
    """
    if not 1 <= stride <= length:
        raise UserError(f"length {length} and stride {stride}; accepted: 1 ≤ stride ≤ length")
    if rows < 1:
        raise UserError(f"rows {rows}; accepted: 1 or more")
    pieces: list[Sequence[int]] = []
    known: list[int] = []  # inputs at the start of each window whose targets were predicted before
    for document in documents:
        inputs = len(document) - 1
        # The last window is the first one that reaches the end.
        for start in range(0, max(inputs - length, 0) + stride, stride) if inputs > 0 else ():
            pieces.append(document[start : min(start + length, inputs) + 1])
            known.append(length - stride if start else 0)
    longest = max((len(piece) - 1 for piece in pieces), default=0)
    packed = pack(pieces, known, row_width(longest, length), rows)
    return (batch for batch, _ in packed)
