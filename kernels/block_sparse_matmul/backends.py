"""The implementations by name, what each can take, and which is chosen where none is named."""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array

from kernels.block_sparse_matmul import pallas_gpu, pallas_tpu, tuned, xla
from kernels.block_sparse_matmul.patterns import Kind, Pattern
from kernels.block_sparse_matmul.tiled import Tiled


class Backend(Protocol):
    """What `reference` defines, of operands that fit together and are not empty; `row` sums over
    pairs, and `swiglu_gradients` are those of x · Gᵀ and x · Uᵀ, with what `swiglu` makes."""

    def column(self, x: Array, w: Array, pattern: Pattern) -> Array: ...

    def row(self, xs: Sequence[Array], ws: Sequence[Array], pattern: Pattern) -> Array: ...

    def sampled(self, a: Array, c: Array, pattern: Pattern, into: Array | None) -> Array: ...

    def swiglu(self, x: Array, gate: Array, up: Array, pattern: Pattern) -> Array: ...

    def swiglu_gradients(
        self, x: Array, gate: Array, up: Array, dh: Array, pattern: Pattern
    ) -> tuple[Array, Array, Array]: ...

    def refusal(self, dtype: jnp.dtype, width: int, block: int) -> str | None:
        """Why a matrix of `width` columns in blocks of `block` cannot be; None: it can."""
        ...


BACKENDS: dict[str, Backend] = {
    "xla": xla,
    "pallas_tpu": Tiled(pallas_tpu),
    "pallas_gpu": Tiled(pallas_gpu),
}
_KERNELS = {"tpu": "pallas_tpu", "gpu": "pallas_gpu"}


def explain(
    dtype: jnp.dtype,
    width: int,
    block: int,
    platform: str | None = None,
    *,
    kind: Kind = "rows",
    device: str | None = None,
    folder: Path = tuned.FOLDER,
) -> tuple[str, dict[str, str]]:
    """The implementation that is chosen where none is named, for patterns of a kind, and why the
    platform's kernel is not.

    That is the kernel, where the `folder` of measurements says that it takes no longer than XLA on
    that kind of device. The platform and the device are by default those at hand.
    """
    here = jax.default_backend()
    platform = platform or here
    name = _KERNELS.get(platform)
    if name is None:
        return "xla", {}
    device = device or (
        tuned.device_kind() if platform == here else f"a {platform.upper()} elsewhere"
    )
    dtype = jnp.dtype(dtype)
    reason = BACKENDS[name].refusal(dtype, width, block)
    reason = reason or tuned.verdict(device, name, kind, str(dtype), block, folder)
    return (name, {}) if reason is None else ("xla", {name: reason})


def choose(
    implementation: str | None,
    dtype: jnp.dtype,
    width: int,
    block: int,
    platform: str | None = None,
    kind: Kind = "rows",
) -> str:
    """The name of an implementation that can do it. Raises `ValueError` where the named one
    cannot."""
    if implementation is None:
        return explain(dtype, width, block, platform, kind=kind)[0]
    if implementation not in BACKENDS:
        raise ValueError(f"implementation: {implementation!r}, accepted {', '.join(BACKENDS)}")
    if reason := BACKENDS[implementation].refusal(jnp.dtype(dtype), width, block):
        raise ValueError(f"implementation {implementation}: {reason}")
    return implementation
