"""Wrapper around `kernels`: products with the kept channels, computed from full matrices. Products
with stored blocks (`column_matmul`, `row_matmul` and `gelu_mlp` with a `BlockMask`) and retention
as they are."""

from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels.block_sparse_matmul import ACTIVATIONS as ACTIVATIONS
from kernels.block_sparse_matmul import Activation as Activation
from kernels.block_sparse_matmul import BlockMask as BlockMask
from kernels.block_sparse_matmul import (
    KeptRows,
    choose,
    column_matmul,
    kept_rows,
    row_matmul,
    swiglu_mlp,
)
from kernels.block_sparse_matmul import gelu_mlp as gelu_mlp
from kernels.retention import Operands as Operands
from kernels.retention import Times as Times
from kernels.retention import absolute_retention as absolute_retention
from kernels.retention import parallel_retention as parallel_retention
from kernels.retention import refusal as _retention_refusal
from kernels.retention import retention as retention

Implementation = Literal["xla", "pallas_tpu", "pallas_gpu"]
RetentionKernel = Literal["xla", "pallas_tpu"]
# The TPU kernels run in interpret mode on a CPU.
_PLATFORMS = {"pallas_tpu": ("tpu", "cpu"), "pallas_gpu": ("gpu",)}


class KernelConfig(NamedTuple):
    """Kernel configuration, static under jit.

    `block`: channels are kept in aligned groups of this size. `implementation`: the kernel by name;
    None chooses the fastest measured one for the device.
    """

    block: int
    implementation: Implementation | None = None

    def refusal(self, dtype: str, width: int, device: Any) -> str | None:
        """Return why a jax device does not support matrices `[F, width]`, or None if it does."""
        if reason := _platform_refusal(self.implementation, device):
            return reason
        capability = getattr(device, "compute_capability", "9.0")
        if self.implementation == "pallas_gpu" and capability != "9.0":
            return f"pallas_gpu on compute capability {capability}; accepted: 9.0 (Hopper)"
        try:
            choose(self.implementation, jnp.dtype(dtype), width, self.block)
        except ValueError as error:
            return str(error)
        return None


def retention_refusal(
    implementation: RetentionKernel,
    dtype: str,
    key_size: int,
    value_size: int,
    chunk: int,
    device: Any,
) -> str | None:
    """Return why a jax device does not support retention of heads of these sizes, or None if it
    does."""
    return _platform_refusal(implementation, device) or _retention_refusal(
        implementation, jnp.dtype(dtype), key_size, value_size, chunk
    )


def _platform_refusal(implementation: str | None, device: Any) -> str | None:
    accepted = _PLATFORMS.get(implementation or "", (device.platform,))
    if device.platform in accepted:
        return None
    return f"{implementation} on {device.platform}; accepted: {', '.join(accepted)}"


class InPlace(NamedTuple):
    """A full matrix, which the kernel reads, and a copy of its kept rows, which gets the gradient.

    The values of `rows` are not read.
    """

    full: Float[Array, "F D"]
    rows: Float[Array, "kept D"]


def kept_mlp(
    x: Float[Array, "*B D"],
    gate: InPlace,
    up: InPlace,
    down: InPlace,
    kept: Int[Array, " kept"],
    config: KernelConfig,
) -> Float[Array, "*B D"]:
    """Return the output of the kept channels: (silu(x · gateᵀ) · (x · upᵀ)) · down.

    `kept`: sorted channel indices, in complete blocks of `config.block`.
    """
    return swiglu_mlp(
        x,
        *(gate.full, up.full, down.full),
        _pattern(kept, config),
        rows=(gate.rows, up.rows, down.rows),
        implementation=config.implementation,
    )


def kept_project(
    x: Float[Array, "*B D"], w: InPlace, kept: Int[Array, " kept"], config: KernelConfig
) -> Float[Array, "*B kept"]:
    """Return x · Wᵀ of the kept rows of W."""
    pattern, name = _pattern(kept, config), config.implementation
    return column_matmul(x, w.full, pattern, rows=w.rows, implementation=name)


def kept_combine(
    a: Float[Array, "*B kept"], w: InPlace, kept: Int[Array, " kept"], config: KernelConfig
) -> Float[Array, "*B D"]:
    """Return a · W of the kept rows of W."""
    pattern, name = _pattern(kept, config), config.implementation
    return row_matmul(a, w.full, pattern, rows=w.rows, implementation=name)


def _pattern(kept: Int[Array, " kept"], config: KernelConfig) -> KeptRows:
    """Channels are kept in complete blocks, so the first index of each block is sufficient."""
    return kept_rows(kept[:: config.block] // config.block, config.block)
