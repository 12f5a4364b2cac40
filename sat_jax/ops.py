"""Wrapper around `kernels`: the MLP of the kept channels, computed from full weight matrices."""

from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels.block_sparse_matmul import choose, kept_rows, swiglu_mlp

Implementation = Literal["xla", "pallas_tpu", "pallas_gpu"]


class KernelConfig(NamedTuple):
    """Kernel configuration, static under jit.

    `block`: channels are kept in aligned groups of this size. `implementation`: the kernel by name;
    None chooses the fastest measured one for the device.
    """

    block: int
    implementation: Implementation | None = None

    def refusal(self, dtype: str, width: int, device: Any) -> str | None:
        """Return why a jax device does not support matrices `[F, width]`, or None if it does.

        On a CPU, the TPU kernels run in interpret mode.
        """
        platforms = {"pallas_tpu": ("tpu", "cpu"), "pallas_gpu": ("gpu",)}
        accepted = platforms.get(self.implementation or "", (device.platform,))
        if device.platform not in accepted:
            return f"{self.implementation} on {device.platform}; accepted: {', '.join(accepted)}"
        capability = getattr(device, "compute_capability", "9.0")
        if self.implementation == "pallas_gpu" and capability != "9.0":
            return f"pallas_gpu on compute capability {capability}; accepted: 9.0 (Hopper)"
        try:
            choose(self.implementation, jnp.dtype(dtype), width, self.block)
        except ValueError as error:
            return str(error)
        return None


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
    # Channels are kept in complete blocks, so the first index of each block is sufficient.
    pattern = kept_rows(kept[:: config.block] // config.block, config.block)
    return swiglu_mlp(
        x,
        *(gate.full, up.full, down.full),
        pattern,
        rows=(gate.rows, up.rows, down.rows),
        implementation=config.implementation,
    )
