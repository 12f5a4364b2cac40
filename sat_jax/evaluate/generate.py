"""Text from a model, token by token, with a key-value cache: greedy or sampled.

Prompts of different lengths are padded on the left, so that every row's next token falls into the
same slot; padding is a document of its own, and positions count from each prompt's first token. All
but a prompt's last token go into the cache at once; the last one is the first step of decoding.
"""

import dataclasses
import functools
import math
from collections.abc import Collection, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from sat_jax.errors import UserError
from sat_jax.models.decoder_config import DecoderConfig
from sat_jax.nn.context import Cache
from sat_jax.nn.decoder import Decoder, for_decoding

# Prompt tokens that go through the model at once. Lengths are rounded up to multiples of the
# smaller number, so that not every length is a compilation of its own.
_CHUNK = 512
_ROUND = 64


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is chosen: the likeliest (temperature 0), or drawn.

    Logits are divided by `temperature`; then only the `top_k` likeliest tokens are left, and of
    those only the likeliest that together reach the probability `top_p` (Holtzman et al.,
    arXiv:1904.09751).
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if self.temperature != 0 and not 1e-6 <= self.temperature < math.inf:
            raise UserError(
                f"temperature {self.temperature}; accepted: 0 (greedy), or from 1e-6 on"
            )
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"top-k {self.top_k}; accepted: 1 or more")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top-p {self.top_p}; accepted: above 0, up to 1")
        if self.temperature == 0 and (self.top_k is not None or self.top_p < 1):
            raise UserError("top-k and top-p need a temperature above 0; at 0 nothing is drawn")


GREEDY = Sampling()


def generate(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    sampling: Sampling = GREEDY,
    seed: int = 0,
    stop_ids: Collection[int] | None = None,
) -> list[list[int]]:
    """The tokens that follow each prompt: up to `max_new_tokens`, or up to a stop token, left out.

    `stop_ids` are the model's end-of-text tokens by default. A row's tokens do not depend on the
    rows beside it (but for rounding), except under `dynamic` RoPE: its angles follow from one
    length, that of the longest prompt plus `max_new_tokens`, for all rows and from the start.
    Raises `UserError` for prompts that the model cannot take.
    """
    parts = stream(
        model,
        prompts,
        max_new_tokens,
        sampling=sampling,
        seed=seed,
        stop_ids=stop_ids,
        every=_ROUND,
    )
    return [[token for part in row for token in part] for row in zip(*parts, strict=True)]


def stream(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    sampling: Sampling = GREEDY,
    seed: int = 0,
    stop_ids: Collection[int] | None = None,
    every: int = 1,
) -> Iterator[list[list[int]]]:
    """What `generate` returns, in parts: for each prompt its next tokens, `every` ones at a time.

    A row that has ended adds empty lists.
    """
    check_prompts(model.config, prompts, max_new_tokens)
    if not 0 <= seed < 1 << 32:
        raise UserError(f"seed {seed}; accepted: 0 to {(1 << 32) - 1}")
    if every < 1:
        raise ValueError(f"every {every}; accepted: 1 or more")
    ends = frozenset(model.config.eos_token_ids if stop_ids is None else stop_ids)
    longest = max(map(len, prompts))
    width = _rounded(longest - 1)
    slots = width + -(-max_new_tokens // _ROUND) * _ROUND
    # A static argument: only where the function depends on it may it force a compilation.
    dynamic = model.config.rope.type == "dynamic"
    length = longest + max_new_tokens if dynamic else slots

    padding = np.array([width + 1 - len(prompt) for prompt in prompts], np.int32)
    tokens = np.zeros((len(prompts), width + 1), np.int32)
    for row, prompt, start in zip(tokens, prompts, padding.tolist(), strict=True):
        row[start:] = prompt
    graph, params = nnx.split(for_decoding(model))
    state = _State(
        cache=_prefill(graph, params, tokens[:, :-1], padding, slots, length),
        padding=jnp.asarray(padding),
        newest=jnp.asarray(tokens[:, -1]),
        ended=jnp.zeros(len(prompts), jnp.bool_),
        made=jnp.zeros((), jnp.int32),
    )
    key, stop = jax.random.key(seed), jnp.asarray(sorted(ends), jnp.int32)
    running, left = [True] * len(prompts), max_new_tokens
    while left and any(running):
        steps = min(every, _ROUND, left)
        state, out, count = _decode(graph, params, state, key, stop, steps, sampling, length)
        part = []
        for index, new in enumerate(np.asarray(out)[:, : int(count)].tolist()):
            end = next((i for i, token in enumerate(new) if token in ends), len(new))
            part.append(new[:end] if running[index] else [])
            running[index] = running[index] and end == len(new)
        yield part
        left -= steps


class _State(NamedTuple):
    cache: Cache
    padding: Int[Array, " B"]  # slots in front of each prompt
    newest: Int[Array, " B"]  # not in the cache yet
    ended: Bool[Array, " B"]
    made: Int[Array, ""]  # tokens so far


@functools.partial(jax.jit, static_argnames=("graph", "slots", "length"))
def _prefill(
    graph: nnx.GraphDef[Decoder],
    params: nnx.State,
    tokens: Int[Array, "B T"],
    padding: Int[Array, " B"],
    slots: int,
    length: int,
) -> Cache:
    """A cache of `slots` with the prompts in it, a chunk of all rows at a time."""
    model: Decoder = nnx.merge(graph, params)
    batch, width = tokens.shape
    chunk = min(width, _CHUNK)

    def body(cache: Cache, tokens: Int[Array, "B C"]) -> tuple[Cache, None]:
        place = cache.used + jnp.arange(chunk)[None] - padding[:, None]
        segment_ids = (place >= 0).astype(jnp.int32)
        _, cache = model.extend(cache, tokens, segment_ids, jnp.maximum(place, 0), length)
        return cache, None

    chunks = jnp.moveaxis(tokens.reshape(batch, -1, chunk), 1, 0)
    cache = model.empty_cache(batch, slots)
    return jax.lax.scan(body, cache, chunks)[0]


@functools.partial(
    jax.jit, static_argnames=("graph", "sampling", "length"), donate_argnames=("state",)
)
def _decode(
    graph: nnx.GraphDef[Decoder],
    params: nnx.State,
    state: _State,
    key: Key[Array, ""],
    stop: Int[Array, " stop"],
    steps: int,
    sampling: Sampling,
    length: int,
) -> tuple[_State, Int[Array, "B _ROUND"], Int[Array, ""]]:
    """Up to `steps` more tokens of every row, fewer once all rows have ended; and how many."""
    model: Decoder = nnx.merge(graph, params)
    ones = jnp.ones((len(state.padding), 1), jnp.int32)

    def body(carry: tuple[_State, Array, Array]) -> tuple[_State, Array, Array]:
        state, out, count = carry
        place = (state.cache.used - state.padding)[:, None]
        x_B1D, cache = model.extend(state.cache, state.newest[:, None], ones, place, length)
        newest = _choose(_logits(model, x_B1D[:, 0]), sampling, key, state.made)
        out = jax.lax.dynamic_update_slice(out, newest[:, None], (0, count))
        ended = state.ended | jnp.any(newest[:, None] == stop[None], axis=-1)
        return _State(cache, state.padding, newest, ended, state.made + 1), out, count + 1

    def unfinished(carry: tuple[_State, Array, Array]) -> Bool[Array, ""]:
        return (carry[2] < steps) & ~jnp.all(carry[0].ended)

    out = jnp.zeros((len(state.padding), _ROUND), jnp.int32)
    return jax.lax.while_loop(unfinished, body, (state, out, jnp.zeros((), jnp.int32)))


def _logits(model: Decoder, x_BD: Float[Array, "B D"]) -> Float[Array, "B V"]:
    return jnp.einsum("BD,VD->BV", x_BD, model.head(), preferred_element_type=jnp.float32)


def _choose(
    logits_BV: Float[Array, "B V"], sampling: Sampling, key: Key[Array, ""], step: Int[Array, ""]
) -> Int[Array, " B"]:
    """The token number `step` of every row; equal logits in the order of their ids."""
    if sampling.temperature == 0:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    batch, size = logits_BV.shape
    scaled = logits_BV / sampling.temperature
    ids = None
    if sampling.top_k is not None or sampling.top_p < 1:
        scaled, ids = jax.lax.top_k(scaled, min(sampling.top_k or size, size))
        probabilities = jax.nn.softmax(scaled, axis=-1)
        reached = jnp.cumsum(probabilities, axis=-1) - probabilities
        # The first is always kept: nothing was reached before it.
        scaled = jnp.where(reached < sampling.top_p, scaled, -jnp.inf)
    at_step = jax.random.fold_in(key, step)
    keys = jax.vmap(functools.partial(jax.random.fold_in, at_step))(jnp.arange(batch))
    drawn = jax.vmap(jax.random.categorical)(keys, scaled)
    if ids is not None:
        drawn = jnp.take_along_axis(ids, drawn[:, None], axis=-1)[:, 0]
    return drawn.astype(jnp.int32)


def _rounded(length: int) -> int:
    """`length` up to a multiple of _ROUND, at least one, or of _CHUNK beyond the first chunk."""
    unit = _ROUND if length <= _CHUNK else _CHUNK
    return -(-max(length, 1) // unit) * unit


def check_prompts(
    config: DecoderConfig, prompts: Sequence[Sequence[int]], max_new_tokens: int
) -> None:
    """Raises `UserError` for prompts that the model of `config` cannot take."""
    if max_new_tokens < 1:
        raise UserError(f"{max_new_tokens} new tokens; accepted: 1 or more")
    if not prompts:
        raise UserError("no prompt; accepted: one or more lists of token ids")
    for number, prompt in enumerate(prompts):
        if not len(prompt):
            raise UserError(f"prompt {number} has no tokens; accepted: at least one")
        if not 0 <= min(prompt) <= max(prompt) < config.vocab_size:
            bad = next(token for token in prompt if not 0 <= token < config.vocab_size)
            last = config.vocab_size - 1
            raise UserError(f"prompt {number} has the id {bad}; the model's are 0 to {last}")
    # `dynamic` stretches its angles to any length; the others were trained up to this one.
    longest = max(map(len, prompts))
    room = config.max_positions
    if longest + max_new_tokens > room and config.rope.type != "dynamic":
        raise UserError(
            f"a prompt of {longest} tokens and {max_new_tokens} new ones are more than the model's"
            f" {room} positions"
        )
