"""The implementations by name, what each supports, and the choice where none is named."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array

from kernels.block_sparse_matmul import pallas_gpu, pallas_tpu, tuned, xla
from kernels.block_sparse_matmul.patterns import BlockMask, Kind, Pattern
from kernels.block_sparse_matmul.tiled import Kernels, Tiled
from kernels.block_sparse_matmul.tuned import Case, Matrix


class Backend(Protocol):
    """The operations of `reference`, for operands of matching shapes that are not empty.

    `row` sums over pairs (x, W). With kept rows, a sampled product is
    dense and needs no backend. `swiglu_gradients` returns the gradients of x · Gᵀ and x · Uᵀ, and
    the result of `swiglu`.
    """

    def column(self, x: Array, w: Array, pattern: Pattern) -> Array: ...

    def row(self, xs: Sequence[Array], ws: Sequence[Array], pattern: Pattern) -> Array: ...

    def sampled(self, a: Array, c: Array, mask: BlockMask) -> Array: ...

    def swiglu(self, x: Array, gate: Array, up: Array, pattern: Pattern) -> Array: ...

    def swiglu_gradients(
        self, x: Array, gate: Array, up: Array, dh: Array, pattern: Pattern
    ) -> tuple[Array, Array, Array]: ...

    def refusal(self, dtype: jnp.dtype, width: int, block: int) -> str | None:
        """Return why matrices of `width` columns in blocks of `block` are refused, None if not."""
        ...


@dataclasses.dataclass(frozen=True)
class Measured:
    """Computes each operation by the kernel of the current platform or by XLA.

    The kernel is used where it was not slower than XLA in the measurements of `folder`.
    """

    folder: Path = tuned.FOLDER

    def column(self, x: Array, w: Array, pattern: Pattern) -> Array:
        """x · Wᵀ."""
        return self._choose("column", x, w, pattern).column(x, w, pattern)

    def row(self, xs: Sequence[Array], ws: Sequence[Array], pattern: Pattern) -> Array:
        """Σ x · W over the pairs (x, W)."""
        operation = "row" if len(xs) == 1 else "row_pairs"
        return self._choose(operation, xs[0], ws[0], pattern).row(xs, ws, pattern)

    def sampled(self, a: Array, c: Array, mask: BlockMask) -> Array:
        """aᵀ · c at the blocks of the mask."""
        return self._choose("sampled", a, c, mask).sampled(a, c, mask)

    def swiglu(self, x: Array, gate: Array, up: Array, pattern: Pattern) -> Array:
        """silu(x · Gᵀ) · (x · Uᵀ)."""
        return self._choose("swiglu", x, gate, pattern).swiglu(x, gate, up, pattern)

    def swiglu_gradients(
        self, x: Array, gate: Array, up: Array, dh: Array, pattern: Pattern
    ) -> tuple[Array, Array, Array]:
        """Return the gradients of x · Gᵀ and x · Uᵀ, and the result of `swiglu`."""
        backend = self._choose("swiglu_gradients", x, gate, pattern)
        return backend.swiglu_gradients(x, gate, up, dh, pattern)

    def refusal(self, _dtype: jnp.dtype, _width: int, _block: int) -> str | None:
        """Return None: XLA supports every dtype and size."""
        return None

    def _choose(self, operation: str, x: Array, w: Array, pattern: Pattern) -> Backend:
        """Return the backend of one operation. `w`: weights `[F, D]` where rows are kept."""
        if isinstance(pattern, BlockMask):
            rows, columns = (count * pattern.block for count in pattern.shape)
            density = pattern.nonzero * pattern.block**2 / (rows * columns)
        else:
            rows, columns = w.shape
            density = pattern.kept / rows
        choices = explain(
            x.dtype,
            x.shape[0],
            Matrix(columns, rows, density),
            pattern.block,
            kind=pattern.kind,
            folder=self.folder,
        )
        return IMPLEMENTATIONS[choices[operation].name] if operation in choices else xla


KERNELS: dict[str, Kernels] = {"pallas_tpu": pallas_tpu, "pallas_gpu": pallas_gpu}
PLATFORM_KERNELS = {"tpu": "pallas_tpu", "gpu": "pallas_gpu"}
# The values of `implementation`.
IMPLEMENTATIONS: dict[str, Backend] = {
    "xla": xla,
    **{name: Tiled(kernels) for name, kernels in KERNELS.items()},
}
_MEASURED = "measured"
BACKENDS = IMPLEMENTATIONS | {_MEASURED: Measured()}


class Choice(NamedTuple):
    """The name of the chosen implementation; `reason`: why it is not a kernel, None if it is."""

    name: str
    reason: str | None


def explain(
    dtype: jnp.dtype,
    tokens: int,
    matrix: Matrix,
    block: int,
    platform: str | None = None,
    *,
    kind: Kind = "rows",
    device: str | None = None,
    folder: Path = tuned.FOLDER,
) -> dict[str, Choice]:
    """Return what `implementation=None` chooses for each operation on patterns of a kind.

    A kernel is chosen where the nearest measurement in `folder` for the device kind says that it
    was not slower than XLA. `platform` and `device` default to the current ones.
    """
    current = jax.default_backend()
    platform = platform or current
    operations = [operation for pattern, operation in tuned.OPERATIONS if pattern == kind]
    if not operations:
        kinds = ", ".join(dict.fromkeys(pattern for pattern, _ in tuned.OPERATIONS))
        raise ValueError(f"kind: {kind!r}, accepted {kinds}")
    name = PLATFORM_KERNELS.get(platform)
    if name is None:
        return dict.fromkeys(operations, Choice("xla", f"there are no kernels for {platform}"))
    if device is None:
        device = tuned.device_kind() if platform == current else f"an unspecified {platform}"
    dtype = jnp.dtype(dtype)
    refusal = BACKENDS[name].refusal(dtype, matrix.width, block)

    def choice(operation: str) -> Choice:
        case = Case(name, kind, operation, str(dtype), block, tokens)
        reason = refusal or tuned.xla_advantage(device, case, matrix, folder)
        return Choice("xla" if reason else name, reason)

    return {operation: choice(operation) for operation in operations}


def choose(implementation: str | None, dtype: jnp.dtype, width: int, block: int) -> str:
    """Return the key of an implementation in `BACKENDS`; None chooses `Measured`.

    Raises `ValueError` if a named implementation does not support the arguments.
    """
    if implementation is None:
        return _MEASURED
    if implementation not in IMPLEMENTATIONS:
        accepted = ", ".join(IMPLEMENTATIONS)
        raise ValueError(f"implementation: {implementation!r}, accepted {accepted}")
    if reason := IMPLEMENTATIONS[implementation].refusal(jnp.dtype(dtype), width, block):
        raise ValueError(f"implementation {implementation}: {reason}")
    return implementation
