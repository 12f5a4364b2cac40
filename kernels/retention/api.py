"""Retention (Sun et al., arXiv:2307.08621) in chunks, differentiable, with documents in a row.

`implementation`: `xla`, or `pallas_tpu` (interpret mode on other platforms). A named implementation
is used or refused, never replaced. There is no kernel for GPU.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels.retention import pallas_tpu, xla
from kernels.retention.reference import Operands


class _Backend(NamedTuple):
    """`refusal(dtype, key_size, value_size, chunk)`: None supports all."""

    retention: Callable[..., tuple[Array, Array]]
    refusal: Callable[[Any, int, int, int], str | None] | None = None


# The values of `implementation`.
IMPLEMENTATIONS: dict[str, _Backend] = {
    "xla": _Backend(xla.retention),
    "pallas_tpu": _Backend(pallas_tpu.retention, pallas_tpu.refusal),
}


def retention(
    operands: Operands,
    *,
    chunk: int,
    implementation: str = "xla",
) -> tuple[Float[Array, "B T H F"], Float[Array, "B H E F"]]:
    """Return the sums of the values that each token sees, and the memory after the row.

    `chunk`: tokens whose pairs are computed at once. For the backward pass the arguments and the
    memories between chunks are saved. Decays have no gradient. Raises `ValueError` if the
    implementation does not support the arguments.
    """
    q_BTHE, v_BTHF = operands.q_BTHE, operands.v_BTHF
    if reason := refusal(implementation, q_BTHE.dtype, q_BTHE.shape[-1], v_BTHF.shape[-1], chunk):
        raise ValueError(reason)
    return IMPLEMENTATIONS[implementation].retention(operands, chunk=chunk)


def refusal(
    implementation: str, dtype: Any, key_size: int, value_size: int, chunk: int
) -> str | None:
    """Return why an implementation does not support arguments of these sizes, None if it does."""
    if implementation not in IMPLEMENTATIONS:
        return f"implementation: {implementation!r}, accepted {', '.join(IMPLEMENTATIONS)}"
    check = IMPLEMENTATIONS[implementation].refusal
    reason = check and check(jnp.dtype(dtype), key_size, value_size, chunk)
    return f"implementation {implementation}: {reason}" if reason else None
