"""Log-likelihood of a text after another one: log p(continuation | context), in nats."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float

from sat_jax.data.tokenizer import Tokenizer
from sat_jax.errors import UserError
from sat_jax.evaluate.packing import pack, row_width
from sat_jax.models.decoder_config import DecoderConfig
from sat_jax.nn.decoder import Decoder
from sat_jax.nn.loss import token_scores

_WIDTH = 256  # slots of a row that short pairs share


Encode: TypeAlias = Callable[[Sequence[str]], list[list[int]]]  # the ids of each text


class Pair(NamedTuple):
    """Token ids of a context and of the predicted continuation, each with at least one id."""

    context: Sequence[int]
    continuation: Sequence[int]

    @property
    def length(self) -> int:
        """The number of input tokens: all but the last one, which is only a target."""
        return len(self.context) + len(self.continuation) - 1


class Likelihood(NamedTuple):
    """log p of a continuation, and whether greedy decoding would generate it."""

    log_p: float
    greedy: bool


def encode_pairs(
    tokenizer: Tokenizer, texts: Sequence[tuple[str, str]], encode: Encode | None = None
) -> list[Pair]:
    """Return the ids of each (context, continuation), as lm-evaluation-harness computes them.

    Both are encoded as one text, which is divided at the length of the encoded context. White space
    at the end of the context belongs to the continuation. An empty context is the bos token, or the
    eos token if there is no bos. `encode` None encodes texts as prompts without a chat template.
    Raises `UserError` if the continuation has no token.
    """
    encode = encode or tokenizer.encode_batch
    contexts = [context.rstrip() for context, _ in texts]
    full_texts = [context + continuation for context, continuation in texts]
    pairs = []
    encoded = zip(encode(contexts), encode(full_texts), strict=True)
    for index, (context, full) in enumerate(encoded):
        if not contexts[index]:
            first = first_token(tokenizer)
            full = full[len(context) :]
            context, full = [first], full if full[:1] == [first] else [first, *full]
        if len(full) <= len(context):
            raise UserError(f"{texts[index][1]!r}: adds no token to its context")
        pairs.append(Pair(full[: len(context)], full[len(context) :]))
    return pairs


def first_token(tokenizer: Tokenizer) -> int:
    """Return the token that replaces an empty context: the bos, or the eos if there is no bos."""
    first = tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id
    if first is None:
        raise UserError(f"tokenizer {tokenizer.name} has no bos or eos token for an empty context")
    return first


def check_pairs(config: DecoderConfig, pairs: Sequence[Pair]) -> int:
    """Return the longest length. Raises `UserError` if it exceeds the positions of the model."""
    longest = max((pair.length for pair in pairs), default=0)
    config.check_length("a prompt with its continuation: the length", longest)
    return longest


def likelihoods(
    model: Decoder,
    pairs: Sequence[Pair],
    rows: int,
    on_batch: Callable[[int], object] = lambda _: None,
) -> list[Likelihood]:
    """Return log p of every pair's continuation; deterministic.

    Pairs are packed as segments into batches of `rows` rows with one shape, so that one program is
    compiled. The other pairs in a row change a result only by rounding. `on_batch` is called with
    the number of input tokens of each batch. Raises `UserError` for a pair that is longer than the
    positions of the model.
    """
    sequences = [[*context, *continuation] for context, continuation in pairs]
    longest = check_pairs(model.config, pairs)
    limit = model.config.max_positions
    width = max(row_width(longest, limit), min(_WIDTH, limit))
    graph, params = nnx.split(model)
    log_p, greedy = np.zeros(len(pairs)), np.ones(len(pairs), np.bool_)
    context = [len(pair.context) - 1 for pair in pairs]
    for batch, members in pack(sequences, context, width, rows):
        scores, best = map(np.asarray, slot_scores(graph, params, batch))
        for row, numbers in enumerate(members):
            slots = batch.loss_mask[row]
            pair_of_slot = numbers[batch.segment_ids[row, slots] - 1]
            np.add.at(log_p, pair_of_slot, scores[row, slots].astype(np.float64))
            np.logical_and.at(greedy, pair_of_slot, best[row, slots])
        on_batch(int((batch.segment_ids > 0).sum()))
    return [Likelihood(float(p), bool(g)) for p, g in zip(log_p, greedy, strict=True)]


@functools.partial(jax.jit, static_argnames=("graph",))
def slot_scores(
    graph: nnx.GraphDef[Decoder], params: nnx.State, batch: Any
) -> tuple[Float[Array, "B T"], Bool[Array, "B T"]]:
    """Return log p(target) of every slot, and whether the target is the most likely token."""
    model: Decoder = nnx.merge(graph, params)
    x_BTD, _ = model.hidden(batch.tokens, batch.segment_ids, batch.positions)
    return token_scores(x_BTD, model.head(), batch.targets, model.compute.loss_chunk)
