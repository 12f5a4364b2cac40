"""Three forms of retention (Sun et al., arXiv:2307.08621): the same sums, computed in three ways.

A head with decay γ sums values over the tokens s ≤ t of the document of token t:

    o_t = Σ_s γ^(t - s) (q_t · k_s) v_s

`parallel` computes all pairs of tokens, `recurrent` updates a state token by token, and `chunkwise`
computes pairs within chunks and passes the state from chunk to chunk. Padding (segment 0) may be
anywhere: it changes no state, counts as no time, and sees itself alone.

Sums are in float32, or in the dtype of the arguments if that is wider. Exponents are masked before
exponentiation: powers of pairs in the wrong order would overflow. Decays have no gradient.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


class State(NamedTuple):
    """The past of every row: Σ γ^(t - s) k_s v_sᵀ over the tokens s of the document of the latest
    token t, its segment id (0: no token yet), and the number of its tokens."""

    memory: Float[Array, "B H E F"]
    segment_id: Int[Array, " B"]
    tokens: Int[Array, " B"]


def empty_state(
    q_BTHE: Float[Array, "B T H E"], v_BTHF: Float[Array, "B T H F"], segment_ids: Array
) -> State:
    """Return the state before the first token."""
    batch, _, heads, size = q_BTHE.shape
    dtype = jnp.promote_types(q_BTHE.dtype, jnp.float32)
    memory = jnp.zeros((batch, heads, size, v_BTHF.shape[-1]), dtype)
    zeros = jnp.zeros(batch, segment_ids.dtype)
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


def parallel(
    q_BTHE: Float[Array, "B T H E"],
    k_BTHE: Float[Array, "B T H E"],
    v_BTHF: Float[Array, "B T H F"],
    log_decay_H: Float[Array, " H"],
    segment_ids: Int[Array, "B T"],
    state: State | None = None,
) -> tuple[Float[Array, "B T H F"], State]:
    """Return the sums, and the state after the row; memory is quadratic in T."""
    state = state or empty_state(q_BTHE, v_BTHF, segment_ids)
    line = timeline(segment_ids, state)
    span = jax.tree.map(lambda x: x[0], _spans(line, segment_ids.shape[1]))
    o_BTHF, memory = _span_sums(state.memory, q_BTHE, k_BTHE, v_BTHF, log_decay_H, span)
    return o_BTHF, _state_after(memory, line)


def recurrent(
    q_BTHE: Float[Array, "B T H E"],
    k_BTHE: Float[Array, "B T H E"],
    v_BTHF: Float[Array, "B T H F"],
    log_decay_H: Float[Array, " H"],
    segment_ids: Int[Array, "B T"],
    state: State | None = None,
) -> tuple[Float[Array, "B T H F"], State]:
    """Return the sums, and the state after the row, token by token."""
    state = state or empty_state(q_BTHE, v_BTHF, segment_ids)
    line, dtype = timeline(segment_ids, state), state.memory.dtype
    decay_BH = jnp.exp(log_decay_H.astype(dtype))[None]

    def step(carry: tuple[Array, Array], inputs: Any) -> tuple[Any, Array]:
        memory, segment_before = carry
        q_BHE, k_BHE, v_BHF, segment_B = inputs
        is_token = (segment_B > 0)[:, None, None, None]
        continues = (segment_B == segment_before)[:, None]
        past = jnp.where(continues, decay_BH, 0)[..., None, None] * memory
        new = k_BHE[..., None].astype(dtype) * v_BHF[..., None, :].astype(dtype)
        memory = jnp.where(is_token, past + new, memory)
        seen = jnp.where(is_token, memory, new)
        o_BHF = jnp.einsum("BHE,BHEF->BHF", q_BHE.astype(dtype), seen)
        return (memory, jnp.where(segment_B > 0, segment_B, segment_before)), o_BHF

    inputs = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), (q_BTHE, k_BTHE, v_BTHF, segment_ids))
    (memory, _), o_TBHF = jax.lax.scan(step, (state.memory, state.segment_id), inputs)
    return jnp.moveaxis(o_TBHF, 0, 1), _state_after(memory, line)


def chunkwise(
    q_BTHE: Float[Array, "B T H E"],
    k_BTHE: Float[Array, "B T H E"],
    v_BTHF: Float[Array, "B T H F"],
    log_decay_H: Float[Array, " H"],
    segment_ids: Int[Array, "B T"],
    state: State | None = None,
    *,
    chunk: int,
) -> tuple[Float[Array, "B T H F"], State]:
    """Return the sums, and the state after the row, in chunks of `chunk` tokens.

    For the backward pass the arguments and the states between chunks are saved: memory is linear
    in T.
    """
    state = state or empty_state(q_BTHE, v_BTHF, segment_ids)
    line, (batch, length) = timeline(segment_ids, state), segment_ids.shape
    size = min(chunk, length)
    q, k, v = (_split(x, size) for x in (q_BTHE, k_BTHE, v_BTHF))
    padded = timeline(jnp.pad(segment_ids, ((0, 0), (0, -length % size))), state)
    o_NBCHF, memory = _chunk_sums(state.memory, q, k, v, log_decay_H, _spans(padded, size))
    o_BTHF = jnp.moveaxis(o_NBCHF, 0, 1).reshape(batch, -1, *v_BTHF.shape[2:])[:, :length]
    return o_BTHF, _state_after(memory, line)


def absolute_sums(
    q_BTHE: Float[Array, "B T H E"],
    k_BTHE: Float[Array, "B T H E"],
    log_decay_H: Float[Array, " H"],
    segment_ids: Int[Array, "B T"],
    *,
    chunk: int,
) -> Float[Array, "B T H"]:
    """Return Σ_s γ^(t - s) |q_t · k_s|, without a gradient.

    No state of fixed size has these sums. Time is quadratic in T, and memory linear.
    """
    q_BTHE, k_BTHE, log_decay_H = jax.lax.stop_gradient((q_BTHE, k_BTHE, log_decay_H))
    (batch, length), size = segment_ids.shape, min(chunk, segment_ids.shape[1])
    line = timeline(jnp.pad(segment_ids, ((0, 0), (0, -length % size))))
    document, time, index = (
        _split(x, size)
        for x in (
            line.document,
            line.time,
            jnp.broadcast_to(jnp.arange(line.time.shape[1])[None], line.time.shape),
        )
    )
    keys = (_split(k_BTHE, size), document, time, index)

    def of_queries(_: None, queries: Any) -> tuple[None, Array]:
        q, document_t, time_t, index_t = queries

        def add(total: Array, keys: Any) -> tuple[Array, None]:
            k, document_s, time_s, index_s = keys
            visible = (document_t[:, :, None] == document_s[:, None]) & (
                index_t[:, :, None] >= index_s[:, None]
            )
            weights = _powers(log_decay_H, time_t[:, :, None] - time_s[:, None], visible)
            return total + jnp.einsum("BHTS,BHTS->BTH", jnp.abs(_scores(q, k)), weights), None

        zeros = jnp.zeros(q.shape[:3], jnp.promote_types(q.dtype, jnp.float32))
        return None, jax.lax.scan(add, zeros, keys)[0]

    _, sums = jax.lax.scan(of_queries, None, (_split(q_BTHE, size), document, time, index))
    return jnp.moveaxis(sums, 0, 1).reshape(batch, -1, q_BTHE.shape[2])[:, :length]


class _Span(NamedTuple):
    """A run of tokens of every row: its documents and times, and those just before it and at its
    end."""

    document: Int[Array, "B C"]
    time: Int[Array, "B C"]
    document_before: Int[Array, " B"]
    time_before: Int[Array, " B"]
    document_after: Int[Array, " B"]
    time_after: Int[Array, " B"]


def _spans(line: Timeline, size: int) -> _Span:
    """Return the spans of `size` tokens of a row, stacked."""
    after = [x[:, size - 1 :: size].T for x in (line.latest, line.time)]
    before = [jnp.concatenate([jnp.zeros_like(x[:1]), x[:-1]]) for x in after]
    return _Span(_split(line.document, size), _split(line.time, size), *before, *after)


def _split(x: Array, size: int) -> Array:
    """Return `[B, T, ...]` as `[N, B, size, ...]`, with zeros at the end."""
    x = jnp.pad(x, [(0, 0), (0, -x.shape[1] % size)] + [(0, 0)] * (x.ndim - 2))
    return jnp.moveaxis(x.reshape(x.shape[0], -1, size, *x.shape[2:]), 1, 0)


def _state_after(memory: Array, line: Timeline) -> State:
    return State(memory, line.segment_id[:, -1], line.age[:, -1])


def _powers(
    log_decay_H: Array, steps: Int[Array, "B ..."], valid: Bool[Array, "B ..."]
) -> Float[Array, "B H ..."]:
    """Return γ^steps of every head where valid, 0 elsewhere."""
    logs = log_decay_H.reshape(1, -1, *(1,) * (steps.ndim - 1))
    return jnp.exp(jnp.where(valid[:, None], steps[:, None] * logs, -jnp.inf))


def _scores(q: Float[Array, "B T H E"], k: Float[Array, "B S H E"]) -> Float[Array, "B H T S"]:
    wide = jnp.promote_types(q.dtype, jnp.float32)
    return jnp.einsum("BTHE,BSHE->BHTS", q, k, preferred_element_type=wide)


def _span_sums(
    memory: Float[Array, "B H E F"],
    q: Float[Array, "B C H E"],
    k: Float[Array, "B C H E"],
    v: Float[Array, "B C H F"],
    log_decay_H: Float[Array, " H"],
    span: _Span,
) -> tuple[Float[Array, "B C H F"], Float[Array, "B H E F"]]:
    """Return the sums of a span, all pairs at once, and the memory after it."""
    document, time = span.document, span.time
    ordered = jnp.tri(q.shape[1], dtype=bool)[None]
    visible = (document[:, :, None] == document[:, None]) & ordered
    within = _powers(log_decay_H, time[:, :, None] - time[:, None], visible)
    since_before = _powers(
        log_decay_H,
        time - span.time_before[:, None],
        document == span.document_before[:, None],
    )
    until_after = _powers(
        log_decay_H, span.time_after[:, None] - time, document == span.document_after[:, None]
    )
    whole = _powers(
        log_decay_H,
        span.time_after - span.time_before,
        span.document_after == span.document_before,
    )
    q, k, v = (x.astype(memory.dtype) for x in (q, k, v))
    o = jnp.einsum("BHTS,BSHF->BTHF", _scores(q, k) * within, v)
    o += jnp.einsum("BTHE,BHEF->BTHF", q * since_before.swapaxes(1, 2)[..., None], memory)
    new = jnp.einsum("BSHE,BSHF->BHEF", k * until_after.swapaxes(1, 2)[..., None], v)
    return o, whole[..., None, None] * memory + new


@jax.custom_vjp
def _chunk_sums(
    memory: Float[Array, "B H E F"],
    q: Float[Array, "N B C H E"],
    k: Float[Array, "N B C H E"],
    v: Float[Array, "N B C H F"],
    log_decay_H: Float[Array, " H"],
    spans: _Span,
) -> tuple[Float[Array, "N B C H F"], Float[Array, "B H E F"]]:
    """Return the sums of N chunks, and the memory after the last."""

    def body(memory: Array, inputs: Any) -> tuple[Array, Array]:
        q, k, v, span = inputs
        o, memory = _span_sums(memory, q, k, v, log_decay_H, span)
        return memory, o

    memory, o = jax.lax.scan(body, memory, (q, k, v, spans))
    return o, memory


def _chunk_sums_forward(
    memory: Array, q: Array, k: Array, v: Array, log_decay_H: Array, spans: _Span
) -> tuple[tuple[Array, Array], Any]:
    def body(memory: Array, inputs: Any) -> tuple[Array, tuple[Array, Array]]:
        q, k, v, span = inputs
        o, after = _span_sums(memory, q, k, v, log_decay_H, span)
        return after, (o, memory)

    after, (o, memories) = jax.lax.scan(body, memory, (q, k, v, spans))
    return (o, after), (memories, q, k, v, log_decay_H, spans)


def _chunk_sums_backward(saved: Any, cotangents: tuple[Array, Array]) -> tuple[Any, ...]:
    """Return the gradients, from the last chunk to the first: pairs within a chunk are computed
    again."""
    memories, q, k, v, log_decay_H, spans = saved
    d_o, d_after = cotangents

    def body(d_memory: Array, inputs: Any) -> tuple[Array, Any]:
        memory, q, k, v, span, d_o = inputs

        def sums(memory: Array, q: Array, k: Array, v: Array) -> tuple[Array, Array]:
            return _span_sums(memory, q, k, v, log_decay_H, span)

        d_memory, *d_inputs = jax.vjp(sums, memory, q, k, v)[1]((d_o, d_memory))
        return d_memory, d_inputs

    d_memory, gradients = jax.lax.scan(body, d_after, (memories, q, k, v, spans, d_o), reverse=True)
    return d_memory, *gradients, None, None


_chunk_sums.defvjp(_chunk_sums_forward, _chunk_sums_backward)
