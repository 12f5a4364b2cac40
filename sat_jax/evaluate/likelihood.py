"""How likely a model finds a text behind another: log p(continuation | context), in nats."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float

from sat_jax.data.tokenizer import Tokenizer
from sat_jax.errors import UserError
from sat_jax.evaluate.rows import pack, row_width
from sat_jax.models.decoder_config import DecoderConfig
from sat_jax.nn.decoder import Decoder
from sat_jax.nn.loss import token_scores

_WIDTH = 256  # short pairs share rows of this many slots


class Pair(NamedTuple):
    """Token ids: of what is given, at least one, and of what is predicted, at least one."""

    context: Sequence[int]
    continuation: Sequence[int]

    @property
    def length(self) -> int:
        """Tokens that the model reads: all but the last, which is only predicted."""
        return len(self.context) + len(self.continuation) - 1


class Likelihood(NamedTuple):
    """log p of a whole continuation, and whether greedy decoding would have written it."""

    log_p: float
    greedy: bool


def encode_pairs(tokenizer: Tokenizer, texts: Sequence[tuple[str, str]]) -> list[Pair]:
    """The ids of (context, continuation), cut where the context alone would end.

    As lm-evaluation-harness does: both are encoded as one text, white space at the end of the
    context belongs to the continuation, and an empty context is the token that begins (or, where
    there is none, ends) a document. Raises `UserError` where nothing is left to predict.
    """
    contexts = [context.rstrip() for context, _ in texts]
    wholes = [context + continuation for context, continuation in texts]
    pairs = []
    encoded = zip(tokenizer.encode_batch(contexts), tokenizer.encode_batch(wholes), strict=True)
    for number, (given, whole) in enumerate(encoded):
        if not contexts[number]:
            first = first_token(tokenizer)
            whole = whole[len(given) :]
            given, whole = [first], whole if whole[:1] == [first] else [first, *whole]
        if len(whole) <= len(given):
            raise UserError(f"{texts[number][1]!r}: has no token of its own behind its context")
        pairs.append(Pair(whole[: len(given)], whole[len(given) :]))
    return pairs


def first_token(tokenizer: Tokenizer) -> int:
    """What stands in front of a text that nothing stands in front of."""
    first = tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id
    if first is None:
        raise UserError(f"tokenizer {tokenizer.name} has no token that an empty context could be")
    return first


def check_pairs(config: DecoderConfig, pairs: Sequence[Pair]) -> None:
    """Raises `UserError` for a pair that the model of `config` has no positions for."""
    longest = max((pair.length for pair in pairs), default=0)
    config.check_length("a prompt and what follows it: the length", longest)


def likelihoods(
    model: Decoder,
    pairs: Sequence[Pair],
    rows: int,
    done: Callable[[int], object] = lambda _: None,
) -> list[Likelihood]:
    """log p of every pair's continuation. The same call, the same bits.

    Pairs share rows, `rows` at once, as segments of their own: one compilation, whatever their
    lengths are. What stands beside a pair changes its number by rounding alone. `done` hears of
    every batch how many tokens it has read. Raises `UserError` for a pair that the model has no
    positions for.
    """
    pieces = [[*context, *continuation] for context, continuation in pairs]
    check_pairs(model.config, pairs)
    most = model.config.max_positions
    longest = max((pair.length for pair in pairs), default=0)
    width = max(row_width(longest, most), min(_WIDTH, most))
    graph, params = nnx.split(model)
    log_p, greedy = np.zeros(len(pairs)), np.ones(len(pairs), np.bool_)
    known = [len(pair.context) - 1 for pair in pairs]
    for batch, of_rows in pack(pieces, known, width, rows):
        scores, best = map(np.asarray, _scores(graph, params, batch))
        for row, members in enumerate(of_rows):
            slots = batch.loss_mask[row]
            of_slot = members[batch.segment_ids[row, slots] - 1]
            np.add.at(log_p, of_slot, scores[row, slots].astype(np.float64))
            np.logical_and.at(greedy, of_slot, best[row, slots])
        done(int((batch.segment_ids > 0).sum()))
    return [Likelihood(float(p), bool(g)) for p, g in zip(log_p, greedy, strict=True)]


@functools.partial(jax.jit, static_argnames=("graph",))
def _scores(
    graph: nnx.GraphDef[Decoder], params: nnx.State, batch: Any
) -> tuple[Float[Array, "B T"], Bool[Array, "B T"]]:
    model: Decoder = nnx.merge(graph, params)
    x_BTD, _ = model.hidden(batch.tokens, batch.segment_ids, batch.positions)
    return token_scores(x_BTD, model.head(), batch.targets, model.compute.loss_chunk)
