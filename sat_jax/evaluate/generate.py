"""Autoregressive generation with a key-value cache: greedy or sampled.

Prompts of different lengths are padded on the left, so that the next token of every row has the
same slot. Padding is a separate segment, and positions count from each prompt's first token. The
cache is prefilled with all tokens of a prompt but the last, which is the first input of decoding.
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
from jaxtyping import Array, Bool, Float, Int, Key, UInt32

from sat_jax.errors import UserError
from sat_jax.models.decoder_config import DecoderConfig
from sat_jax.nn.context import Cache
from sat_jax.nn.decoder import Decoder, for_decoding

# Prompt tokens per forward pass of the prefill. Lengths are rounded up to multiples of _ROUND, so
# that few lengths are compiled.
_CHUNK = 512
_ROUND = 64


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Choice of the next token: the most likely one (temperature 0), or a random one.

    Logits are divided by `temperature`. Then only the `top_k` most likely tokens are kept, and of
    these only the most likely ones that together reach the probability `top_p` (Holtzman et al.,
    arXiv:1904.09751).
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if self.temperature != 0 and not 1e-6 <= self.temperature < math.inf:
            raise UserError(
                f"temperature {self.temperature}; accepted: 0 (greedy), or 1e-6 or more"
            )
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"top-k {self.top_k}; accepted: 1 or more")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top-p {self.top_p}; accepted: above 0, up to 1")
        if self.temperature == 0 and (self.top_k is not None or self.top_p < 1):
            raise UserError("top-k and top-p need a temperature above 0; at 0 decoding is greedy")


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
    """Return the tokens after each prompt: at most `max_new_tokens`, and none from a stop token on.

    `stop_ids` defaults to the model's end-of-text tokens. A row's tokens do not depend on the other
    rows (except for rounding). Each token is that of a forward pass over all tokens before it, also
    where RoPE depends on the length: with `dynamic` and `dynamic_yarn` each token beyond the
    original length then costs a pass over the row. Raises `UserError` for prompts that the model
    does not accept.
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
    numbers: Sequence[int] | None = None,
) -> Iterator[list[list[int]]]:
    """Yield the result of `generate` in parts: the next `every` tokens of each prompt.

    A row that has ended has empty lists in later parts. The random numbers of a row depend on
    `seed` and on its number, below 2³²; None: the rows are numbered from 0.
    """
    check_prompts(model.config, prompts, max_new_tokens)
    if not 0 <= seed < 1 << 32:
        raise UserError(f"seed {seed}; accepted: 0 to {(1 << 32) - 1}")
    stop_tokens = frozenset(model.config.eos_token_ids if stop_ids is None else stop_ids)
    longest = max(map(len, prompts))
    width = _rounded(longest - 1)
    slots = width + -(-max_new_tokens // _ROUND) * _ROUND

    padding = np.array([width + 1 - len(prompt) for prompt in prompts], np.int32)
    tokens = np.zeros((len(prompts), width + 1), np.int32)
    for row, prompt, start in zip(tokens, prompts, padding.tolist(), strict=True):
        row[start:] = prompt
    graph, params = nnx.split(for_decoding(model))
    state = _State(
        cache=_prefill(graph, params, tokens[:, :-1], padding, slots),
        padding=jnp.asarray(padding),
        numbers=jnp.asarray(range(len(prompts)) if numbers is None else numbers, jnp.uint32),
        newest=jnp.asarray(tokens[:, -1]),
        ended=jnp.zeros(len(prompts), jnp.bool_),
        step=jnp.zeros((), jnp.int32),
    )
    key, stop = jax.random.key(seed), jnp.asarray(sorted(stop_tokens), jnp.int32)
    running, remaining = [True] * len(prompts), max_new_tokens
    while remaining and any(running):
        steps = min(every, _ROUND, remaining)
        state, out, count = _decode(graph, params, state, key, stop, steps, sampling)
        part = []
        for index, new in enumerate(np.asarray(out)[:, : int(count)].tolist()):
            end = next((i for i, token in enumerate(new) if token in stop_tokens), len(new))
            part.append(new[:end] if running[index] else [])
            running[index] = running[index] and end == len(new)
        yield part
        remaining -= steps


class _State(NamedTuple):
    cache: Cache
    padding: Int[Array, " B"]  # slots before each prompt
    numbers: UInt32[Array, " B"]  # of the random numbers of each row
    newest: Int[Array, " B"]  # the last token, not in the cache yet
    ended: Bool[Array, " B"]
    step: Int[Array, ""]  # number of generated tokens


@functools.partial(jax.jit, static_argnames=("graph", "slots"))
def _prefill(
    graph: nnx.GraphDef[Decoder],
    params: nnx.State,
    tokens: Int[Array, "B T"],
    padding: Int[Array, " B"],
    slots: int,
) -> Cache:
    """Return a cache of `slots` with the prompts, computed in chunks of all rows."""
    model: Decoder = nnx.merge(graph, params)
    batch, width = tokens.shape
    chunk = min(width, _CHUNK)

    positions = jnp.arange(width)[None] - padding[:, None]
    prompts = tokens, (positions >= 0).astype(jnp.int32), jnp.maximum(positions, 0)
    # All are written first: RoPE may depend on the length of a prompt.
    cache = model.empty_cache(batch, slots).write(*prompts)

    def body(cache: Cache, part: tuple[Array, ...]) -> tuple[Cache, None]:
        return model.advance(cache, *part)[1], None

    parts = tuple(x.reshape(batch, -1, chunk).swapaxes(0, 1) for x in prompts)
    return jax.lax.scan(body, cache, parts)[0]


@functools.partial(jax.jit, static_argnames=("graph", "sampling"), donate_argnames=("state",))
def _decode(
    graph: nnx.GraphDef[Decoder],
    params: nnx.State,
    state: _State,
    key: Key[Array, ""],
    stop: Int[Array, " stop"],
    steps: int,
    sampling: Sampling,
) -> tuple[_State, Int[Array, "B _ROUND"], Int[Array, ""]]:
    """Generate up to `steps` tokens of every row; return also the tokens and their number.

    It stops when all rows have ended.
    """
    model: Decoder = nnx.merge(graph, params)
    ones = jnp.ones((len(state.padding), 1), jnp.int32)

    def body(carry: tuple[_State, Array, Array]) -> tuple[_State, Array, Array]:
        state, out, count = carry
        positions = (state.cache.used - state.padding)[:, None]
        x_B1D, cache = model.extend(state.cache, state.newest[:, None], ones, positions)
        logits_BV = jnp.einsum(
            "BD,VD->BV", x_B1D[:, 0], model.head(), preferred_element_type=jnp.float32
        )
        newest = _sample(logits_BV, sampling, key, state.step, state.numbers)
        out = jax.lax.dynamic_update_slice(out, newest[:, None], (0, count))
        ended = state.ended | jnp.any(newest[:, None] == stop[None], axis=-1)
        after = state._replace(cache=cache, newest=newest, ended=ended, step=state.step + 1)
        return after, out, count + 1

    def unfinished(carry: tuple[_State, Array, Array]) -> Bool[Array, ""]:
        return (carry[2] < steps) & ~jnp.all(carry[0].ended)

    out = jnp.zeros((len(state.padding), _ROUND), jnp.int32)
    return jax.lax.while_loop(unfinished, body, (state, out, jnp.zeros((), jnp.int32)))


def _sample(
    logits_BV: Float[Array, "B V"],
    sampling: Sampling,
    key: Key[Array, ""],
    step: Int[Array, ""],
    numbers: UInt32[Array, " B"],
) -> Int[Array, " B"]:
    """Return token `step` of every row; among equal logits the smallest id comes first."""
    if sampling.temperature == 0:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    size = logits_BV.shape[1]
    scaled = logits_BV / sampling.temperature
    ids = None
    if sampling.top_k is not None or sampling.top_p < 1:
        scaled, ids = jax.lax.top_k(scaled, min(sampling.top_k or size, size))
        probabilities = jax.nn.softmax(scaled, axis=-1)
        reached = jnp.cumsum(probabilities, axis=-1) - probabilities
        # The first token is always kept: the probability before it is 0.
        scaled = jnp.where(reached < sampling.top_p, scaled, -jnp.inf)
    step_key = jax.random.fold_in(key, step)
    keys = jax.vmap(functools.partial(jax.random.fold_in, step_key))(numbers)
    tokens = jax.vmap(jax.random.categorical)(keys, scaled)
    if ids is not None:
        tokens = jnp.take_along_axis(ids, tokens[:, None], axis=-1)[:, 0]
    return tokens.astype(jnp.int32)


def _rounded(length: int) -> int:
    """Return `length` rounded up to a multiple of _ROUND, or of _CHUNK if it exceeds a chunk."""
    unit = _ROUND if length <= _CHUNK else _CHUNK
    return -(-max(length, 1) // unit) * unit


def check_prompts(
    config: DecoderConfig, prompts: Sequence[Sequence[int]], max_new_tokens: int
) -> None:
    """Raise `UserError` for prompts that the model of `config` does not accept."""
    if max_new_tokens < 1:
        raise UserError(f"{max_new_tokens} new tokens; accepted: 1 or more")
    if not prompts:
        raise UserError("no prompt; accepted: one or more lists of token ids")
    for index, prompt in enumerate(prompts):
        if not len(prompt):
            raise UserError(f"prompt {index} has no tokens; accepted: at least one")
        if not 0 <= min(prompt) <= max(prompt) < config.vocab_size:
            invalid = next(token for token in prompt if not 0 <= token < config.vocab_size)
            last = config.vocab_size - 1
            raise UserError(f"prompt {index} has the id {invalid}; accepted: 0 to {last}")
    longest = max(map(len, prompts))
    name = f"a prompt of {longest} tokens and {max_new_tokens} new tokens: the length"
    config.check_length(name, longest + max_new_tokens)
