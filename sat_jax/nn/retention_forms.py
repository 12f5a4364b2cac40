"""Three forms of retention (Sun et al., arXiv:2307.08621): the same sums, computed in three ways.

A head with decay γ sums values over the tokens s ≤ t of the document of token t:

    o_t = Σ_s γ^(t - s) (q_t · k_s) v_s

`parallel` computes all pairs of tokens, `recurrent` updates a state token by token, and `chunkwise`
computes pairs within chunks and passes the state from chunk to chunk. Padding (segment 0) may be
anywhere: it changes no state, counts as no time, and sees itself alone.

Sums are in float32, or in the dtype of the arguments if that is wider. Decays have no gradient.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from sat_jax.ops import (
    Operands,
    RetentionKernel,
    Times,
    absolute_retention,
    parallel_retention,
    retention,
)


class Inputs(NamedTuple):
    """Queries, keys and values of T tokens of every row, the logarithms of the heads' decays, and
    the documents of the tokens; 0 is padding."""

    q_BTHE: Float[Array, "B T H E"]
    k_BTHE: Float[Array, "B T H E"]
    v_BTHF: Float[Array, "B T H F"]
    log_decay_H: Float[Array, " H"]
    segment_ids: Int[Array, "B T"]


class State(NamedTuple):
    """The past of every row: Σ γ^(t - s) k_s v_sᵀ over the tokens s of the document of the latest
    token t, its segment id (0: no token yet), and the number of its tokens."""

    memory: Float[Array, "B H E F"]
    segment_id: Int[Array, " B"]
    tokens: Int[Array, " B"]


def empty_state(inputs: Inputs) -> State:
    """Return the state before the first token."""
    batch, _, heads, size = inputs.q_BTHE.shape
    dtype = jnp.promote_types(inputs.q_BTHE.dtype, jnp.float32)
    memory = jnp.zeros((batch, heads, size, inputs.v_BTHF.shape[-1]), dtype)
    zeros = jnp.zeros(batch, inputs.segment_ids.dtype)
    return State(memory, zeros, zeros)


class Timeline(NamedTuple):
    """Documents and time within a row. Each array is `[B, T]`, int32.

    `document` numbers a token's document, 0 for that of the state before; padding has numbers of
    its own, below 0. `latest` is the number of the last token's document up to here, `segment_id`
    its segment id and `age` how many tokens of it there are. `time` counts all tokens up to here.
    """

    document: Int[Array, "B T"]
    latest: Int[Array, "B T"]
    segment_id: Int[Array, "B T"]
    age: Int[Array, "B T"]
    time: Int[Array, "B T"]

    @property
    def times(self) -> Times:
        """Return the documents and times that `kernels.retention` reads."""
        return Times(self.document, self.latest, self.time)


def timeline(segment_ids: Int[Array, "B T"], state: State | None = None) -> Timeline:
    """Return the documents of a row, which begins with `state` (None: with nothing).

    A document begins where the segment id differs from that of the last token before it.
    """
    is_token = segment_ids > 0
    index = jnp.arange(1, segment_ids.shape[1] + 1, dtype=jnp.int32)[None]
    before_B = jnp.zeros_like(segment_ids[:, 0]) if state is None else state.segment_id
    tokens_B = jnp.zeros_like(segment_ids[:, 0]) if state is None else state.tokens
    last_token = jax.lax.cummax(jnp.where(is_token, index, 0), axis=1)  # 0: none in this row
    ids = jnp.concatenate([before_B[:, None], segment_ids], axis=1)
    segment_id = jnp.take_along_axis(ids, last_token, axis=1)
    previous = jnp.concatenate([before_B[:, None], segment_id[:, :-1]], axis=1)
    begins = is_token & (segment_ids != previous)
    latest = jnp.cumsum(begins, axis=1, dtype=jnp.int32)
    time = jnp.cumsum(is_token, axis=1, dtype=jnp.int32)
    begin_time = jax.lax.cummax(jnp.where(begins, time - 1, 0), axis=1)
    age = time - jnp.where(latest == 0, -tokens_B[:, None], begin_time)
    return Timeline(jnp.where(is_token, latest, -index), latest, segment_id, age, time)


def parallel(inputs: Inputs, state: State | None = None) -> tuple[Float[Array, "B T H F"], State]:
    """Return the sums, and the state after the row; memory is quadratic in T."""
    state = state or empty_state(inputs)
    line = timeline(inputs.segment_ids, state)
    o_BTHF, memory = parallel_retention(Operands(*inputs[:4], state.memory, line.times))
    return o_BTHF, _state_after(memory, line)


def recurrent(inputs: Inputs, state: State | None = None) -> tuple[Float[Array, "B T H F"], State]:
    """Return the sums, and the state after the row, token by token."""
    state = state or empty_state(inputs)
    *qkv, log_decay_H, segment_ids = inputs
    line, dtype = timeline(segment_ids, state), state.memory.dtype
    decay_BH = jnp.exp(log_decay_H.astype(dtype))[None]

    def step(carry: tuple[Array, Array], token: Any) -> tuple[Any, Array]:
        memory, segment_before = carry
        q_BHE, k_BHE, v_BHF, segment_B = token
        is_token = (segment_B > 0)[:, None, None, None]
        continues = (segment_B == segment_before)[:, None]
        past = jnp.where(continues, decay_BH, 0)[..., None, None] * memory
        new = k_BHE[..., None].astype(dtype) * v_BHF[..., None, :].astype(dtype)
        memory = jnp.where(is_token, past + new, memory)
        seen = jnp.where(is_token, memory, new)
        o_BHF = jnp.einsum("BHE,BHEF->BHF", q_BHE.astype(dtype), seen)
        return (memory, jnp.where(segment_B > 0, segment_B, segment_before)), o_BHF

    tokens = [jnp.moveaxis(x, 1, 0) for x in (*qkv, segment_ids)]
    (memory, _), o_TBHF = jax.lax.scan(step, (state.memory, state.segment_id), tokens)
    return jnp.moveaxis(o_TBHF, 0, 1), _state_after(memory, line)


def chunkwise(
    inputs: Inputs,
    state: State | None = None,
    *,
    chunk: int,
    implementation: RetentionKernel = "xla",
) -> tuple[Float[Array, "B T H F"], State]:
    """Return the sums, and the state after the row, in chunks of `chunk` tokens.

    For the backward pass the arguments and the states between chunks are saved: memory is linear
    in T. Raises `ValueError` for arguments that the implementation does not support.
    """
    state = state or empty_state(inputs)
    line = timeline(inputs.segment_ids, state)
    operands = Operands(*inputs[:4], state.memory, line.times)
    o_BTHF, memory = retention(operands, chunk=chunk, implementation=implementation)
    return o_BTHF, _state_after(memory, line)


def absolute_sums(inputs: Inputs, *, chunk: int) -> Float[Array, "B T H"]:
    """Return Σ_s γ^(t - s) |q_t · k_s|, without a gradient.

    No state of fixed size has these sums. Time is quadratic in T, and memory linear.
    """
    q_BTHE, k_BTHE, _, log_decay_H, segment_ids = inputs
    times = timeline(segment_ids).times
    return absolute_retention(q_BTHE, k_BTHE, log_decay_H, times, chunk=chunk)


def _state_after(memory: Array, line: Timeline) -> State:
    return State(memory, line.segment_id[:, -1], line.age[:, -1])
