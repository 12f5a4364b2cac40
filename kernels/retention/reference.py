"""Reference implementation, which defines retention: all pairs of tokens of a row at once.

Every backend is tested against it. Sums are in float32, or in the dtype of the arguments if that is
wider. Exponents are masked before exponentiation: powers of pairs in the wrong order would
overflow.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


class Times(NamedTuple):
    """Documents and time of the tokens of a row. Each array is `[B, T]`, int32.

    `document` numbers a token's document, 0 for that of the memory before the row. Token t sees the
    tokens s ≤ t of its document, each with the weight γ^(time[t] - time[s]). `latest` is the
    document that the memory after a token is of, at its `time`; the memory before the row has
    time 0.
    """

    document: Int[Array, "B T"]
    latest: Int[Array, "B T"]
    time: Int[Array, "B T"]


class Operands(NamedTuple):
    """Queries, keys and values of T tokens of every row, the logarithms of the heads' decays, the
    memory before the row (float32, or wider where the others are), and the tokens' times."""

    q_BTHE: Float[Array, "B T H E"]
    k_BTHE: Float[Array, "B T H E"]
    v_BTHF: Float[Array, "B T H F"]
    log_decay_H: Float[Array, " H"]
    memory_BHEF: Float[Array, "B H E F"]
    times: Times


class Span(NamedTuple):
    """A run of tokens of every row: its documents and times, and those just before it and at its
    end."""

    document: Int[Array, "B C"]
    time: Int[Array, "B C"]
    document_before: Int[Array, " B"]
    time_before: Int[Array, " B"]
    document_after: Int[Array, " B"]
    time_after: Int[Array, " B"]


def retention(
    operands: Operands,
) -> tuple[Float[Array, "B T H F"], Float[Array, "B H E F"]]:
    """Return the sums and the memory after the row; memory use is quadratic in T."""
    times = operands.times
    zeros_B = jnp.zeros_like(times.time[:, 0])
    ends = (zeros_B, zeros_B, times.latest[:, -1], times.time[:, -1])
    span = Span(times.document, times.time, *ends)
    return span_sums(operands.memory_BHEF, *operands[:4], span)


def span_sums(
    memory: Float[Array, "B H E F"],
    q: Float[Array, "B C H E"],
    k: Float[Array, "B C H E"],
    v: Float[Array, "B C H F"],
    log_decay_H: Float[Array, " H"],
    span: Span,
) -> tuple[Float[Array, "B C H F"], Float[Array, "B H E F"]]:
    """Return the sums of a span, all pairs at once, and the memory after it."""
    document, time = span.document, span.time
    ordered = jnp.tri(q.shape[1], dtype=bool)[None]
    visible = (document[:, :, None] == document[:, None]) & ordered
    within = powers(log_decay_H, time[:, :, None] - time[:, None], visible)
    since_before = powers(
        log_decay_H,
        time - span.time_before[:, None],
        document == span.document_before[:, None],
    )
    until_after = powers(
        log_decay_H, span.time_after[:, None] - time, document == span.document_after[:, None]
    )
    kept = powers(
        log_decay_H,
        span.time_after - span.time_before,
        span.document_after == span.document_before,
    )
    q, k, v = (x.astype(memory.dtype) for x in (q, k, v))
    o = jnp.einsum("BHTS,BSHF->BTHF", scores(q, k) * within, v)
    o += jnp.einsum("BTHE,BHEF->BTHF", q * since_before.swapaxes(1, 2)[..., None], memory)
    new = jnp.einsum("BSHE,BSHF->BHEF", k * until_after.swapaxes(1, 2)[..., None], v)
    return o, kept[..., None, None] * memory + new


def powers(
    log_decay_H: Array, steps: Int[Array, "B ..."], valid: Bool[Array, "B ..."]
) -> Float[Array, "B H ..."]:
    """Return γ^steps of every head where valid, 0 elsewhere."""
    logs = log_decay_H.reshape(1, -1, *(1,) * (steps.ndim - 1))
    return jnp.exp(jnp.where(valid[:, None], steps[:, None] * logs, -jnp.inf))


def scores(q: Float[Array, "B T H E"], k: Float[Array, "B S H E"]) -> Float[Array, "B H T S"]:
    """Return q · k of all pairs."""
    wide = jnp.promote_types(q.dtype, jnp.float32)
    return jnp.einsum("BTHE,BSHE->BHTS", q, k, preferred_element_type=wide)
