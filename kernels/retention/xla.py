"""Retention in chunks, in XLA: pairs within chunks, and a memory that passes from one to the next.

For the backward pass the arguments and the memories between chunks are saved, linear in T.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels.retention.reference import Operands, Span, Times, powers, scores, span_sums


def retention(
    operands: Operands,
    *,
    chunk: int,
) -> tuple[Float[Array, "B T H F"], Float[Array, "B H E F"]]:
    """See `api.retention`."""
    *qkv, log_decay_H, memory_BHEF, times = operands
    batch, length, *heads = operands.v_BTHF.shape
    size = min(chunk, length)
    q, k, v = (_split(x, size) for x in qkv)
    spans = _spans(pad_times(times, size), size)
    o_NBCHF, memory = _chunk_sums(memory_BHEF, q, k, v, log_decay_H, spans)
    return jnp.moveaxis(o_NBCHF, 0, 1).reshape(batch, -1, *heads)[:, :length], memory


def absolute_retention(
    q_BTHE: Float[Array, "B T H E"],
    k_BTHE: Float[Array, "B T H E"],
    log_decay_H: Float[Array, " H"],
    times: Times,
    *,
    chunk: int,
) -> Float[Array, "B T H"]:
    """Return Σ_s γ^(t - s) |q_t · k_s| over the row, without a gradient.

    No state of fixed size has these sums. Time is quadratic in T, and memory linear.
    """
    q_BTHE, k_BTHE, log_decay_H = jax.lax.stop_gradient((q_BTHE, k_BTHE, log_decay_H))
    (batch, length), size = times.time.shape, min(chunk, times.time.shape[1])
    times = pad_times(times, size)
    index = jnp.broadcast_to(jnp.arange(times.time.shape[1])[None], times.time.shape)
    document, time, index = (_split(x, size) for x in (times.document, times.time, index))
    keys = (_split(k_BTHE, size), document, time, index)

    def of_queries(_: None, queries: Any) -> tuple[None, Array]:
        q, document_t, time_t, index_t = queries

        def add(total: Array, keys: Any) -> tuple[Array, None]:
            k, document_s, time_s, index_s = keys
            visible = (document_t[:, :, None] == document_s[:, None]) & (
                index_t[:, :, None] >= index_s[:, None]
            )
            weights = powers(log_decay_H, time_t[:, :, None] - time_s[:, None], visible)
            return total + jnp.einsum("BHTS,BHTS->BTH", jnp.abs(scores(q, k)), weights), None

        zeros = jnp.zeros(q.shape[:3], jnp.promote_types(q.dtype, jnp.float32))
        return None, jax.lax.scan(add, zeros, keys)[0]

    _, sums = jax.lax.scan(of_queries, None, (_split(q_BTHE, size), document, time, index))
    return jnp.moveaxis(sums, 0, 1).reshape(batch, -1, q_BTHE.shape[2])[:, :length]


def pad_times(times: Times, size: int) -> Times:
    """Return the times of a multiple of `size` tokens. The added tokens change no memory, if their
    keys or values are 0, and no time passes."""
    added = -times.time.shape[1] % size
    return Times(*(jnp.pad(x, ((0, 0), (0, added)), mode="edge") for x in times))


def _spans(times: Times, size: int) -> Span:
    """Return the spans of `size` tokens of a row, stacked."""
    after = [x[:, size - 1 :: size].T for x in (times.latest, times.time)]
    before = [jnp.concatenate([jnp.zeros_like(x[:1]), x[:-1]]) for x in after]
    return Span(_split(times.document, size), _split(times.time, size), *before, *after)


def _split(x: Array, size: int) -> Array:
    """Return `[B, T, ...]` as `[N, B, size, ...]`, with zeros at the end."""
    x = jnp.pad(x, [(0, 0), (0, -x.shape[1] % size)] + [(0, 0)] * (x.ndim - 2))
    return jnp.moveaxis(x.reshape(x.shape[0], -1, size, *x.shape[2:]), 1, 0)


@jax.custom_vjp
def _chunk_sums(
    memory: Float[Array, "B H E F"],
    q: Float[Array, "N B C H E"],
    k: Float[Array, "N B C H E"],
    v: Float[Array, "N B C H F"],
    log_decay_H: Float[Array, " H"],
    spans: Span,
) -> tuple[Float[Array, "N B C H F"], Float[Array, "B H E F"]]:
    """Return the sums of N chunks, and the memory after the last."""

    def body(memory: Array, inputs: Any) -> tuple[Array, Array]:
        q, k, v, span = inputs
        o, memory = span_sums(memory, q, k, v, log_decay_H, span)
        return memory, o

    memory, o = jax.lax.scan(body, memory, (q, k, v, spans))
    return o, memory


def _chunk_sums_forward(
    memory: Array, q: Array, k: Array, v: Array, log_decay_H: Array, spans: Span
) -> tuple[tuple[Array, Array], Any]:
    def body(memory: Array, inputs: Any) -> tuple[Array, tuple[Array, Array]]:
        q, k, v, span = inputs
        o, after = span_sums(memory, q, k, v, log_decay_H, span)
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
            return span_sums(memory, q, k, v, log_decay_H, span)

        d_memory, *d_inputs = jax.vjp(sums, memory, q, k, v)[1]((d_o, d_memory))
        return d_memory, d_inputs

    d_memory, gradients = jax.lax.scan(body, d_after, (memories, q, k, v, spans, d_o), reverse=True)
    return d_memory, *gradients, None, None


_chunk_sums.defvjp(_chunk_sums_forward, _chunk_sums_backward)
