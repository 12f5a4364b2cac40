"""The door to `kernels/`: an MLP's products with the channels that are kept, whole matrices in."""

from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels.block_sparse_matmul import choose, kept_rows, swiglu_mlp

Implementation = Literal["xla", "pallas_tpu", "pallas_gpu"]


class KernelConfig(NamedTuple):
    """Channels are kept in aligned runs of `block`; `implementation` computes with them, None: the
    best there is here. Static under jit."""

    block: int
    implementation: Implementation | None = None

    def refusal(self, dtype: str, width: int, device: Any) -> str | None:
        """Why matrices `[F, width]` cannot be on a jax device; None: they can. On a CPU, kernels
        for TPU are interpreted."""
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
    """A matrix that is computed with where it lies, and its kept rows once more: the gradient is
    theirs."""

    full: Float[Array, "F D"]
    rows: Float[Array, "kept D"]


def kept_mlp(
    x: Float[Array, "*B D"],
    gate: InPlace,
    up: InPlace,
    down: InPlace,
    kept: Int[Array, " kept"],
    how: KernelConfig,
) -> Float[Array, "*B D"]:
    """What the kept channels alone add to the residual stream: silu(x·gate)·(x·up) · down."""
    # Kept channels come in whole blocks, whose ids say all.
    pattern = kept_rows(kept[:: how.block] // how.block, how.block)
    return swiglu_mlp(
        x,
        *(gate.full, up.full, down.full),
        pattern,
        rows=(gate.rows, up.rows, down.rows),
        implementation=how.implementation,
    )
