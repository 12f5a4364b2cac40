"""The implementations by name, what each can take, and which is chosen where none is named."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array

from kernels.block_sparse_matmul import pallas_gpu, pallas_tpu, tuned, xla
from kernels.block_sparse_matmul.patterns import BlockMask, Kind, Pattern
from kernels.block_sparse_matmul.tiled import Tiled
from kernels.block_sparse_matmul.tuned import Case, Matrix


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


@dataclasses.dataclass(frozen=True)
class Measured:
    """Each operation by the kernel of the platform at hand where the `folder` of measurements says
    that it takes no longer there, else by XLA."""

    folder: Path = tuned.FOLDER

    def column(self, x: Array, w: Array, pattern: Pattern) -> Array:
        """x · Wᵀ."""
        return self._by("column", x, w, pattern).column(x, w, pattern)

    def row(self, xs: Sequence[Array], ws: Sequence[Array], pattern: Pattern) -> Array:
        """Σ of x · W over pairs."""
        operation = "row" if len(xs) == 1 else "row_pairs"
        return self._by(operation, xs[0], ws[0], pattern).row(xs, ws, pattern)

    def sampled(self, a: Array, c: Array, pattern: Pattern, into: Array | None) -> Array:
        """aᵀ · c. Of kept rows no backend has a kernel."""
        by = self._by("sampled", a, c, pattern) if isinstance(pattern, BlockMask) else xla
        return by.sampled(a, c, pattern, into)

    def swiglu(self, x: Array, gate: Array, up: Array, pattern: Pattern) -> Array:
        """silu(x · Gᵀ) · (x · Uᵀ)."""
        return self._by("swiglu", x, gate, pattern).swiglu(x, gate, up, pattern)

    def swiglu_gradients(
        self, x: Array, gate: Array, up: Array, dh: Array, pattern: Pattern
    ) -> tuple[Array, Array, Array]:
        """The gradients of x · Gᵀ and x · Uᵀ, and what `swiglu` makes of them."""
        by = self._by("swiglu_gradients", x, gate, pattern)
        return by.swiglu_gradients(x, gate, up, dh, pattern)

    def refusal(self, _dtype: jnp.dtype, _width: int, _block: int) -> str | None:
        """None: XLA takes everything."""
        return None

    def _by(self, operation: str, x: Array, w: Array, pattern: Pattern) -> Backend:
        """`w` are weights `[F, D]` where rows are kept."""
        if isinstance(pattern, BlockMask):
            rows, columns = (count * pattern.block for count in pattern.shape)
            share = pattern.nonzero * pattern.block**2 / (rows * columns)
        else:
            rows, columns = w.shape
            share = pattern.kept / rows
        known = explain(
            x.dtype,
            x.shape[0],
            Matrix(columns, rows, share),
            pattern.block,
            kind=pattern.kind,
            folder=self.folder,
        )
        return IMPLEMENTATIONS[known[operation].name] if operation in known else xla


# Those that can be named.
IMPLEMENTATIONS: dict[str, Backend] = {
    "xla": xla,
    "pallas_tpu": Tiled(pallas_tpu),
    "pallas_gpu": Tiled(pallas_gpu),
}
_MEASURED = "measured"
BACKENDS = IMPLEMENTATIONS | {_MEASURED: Measured()}
_KERNELS = {"tpu": "pallas_tpu", "gpu": "pallas_gpu", "cuda": "pallas_gpu"}


class Choice(NamedTuple):
    """An implementation by name, and why it is not the platform's kernel. None: it is."""

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
    """By operation what is chosen where no implementation is named, for patterns of a kind.

    That is the kernel, where the `folder` of measurements says that it took no longer than XLA on
    that kind of device, by the timing that is nearest. The platform and the device are by default
    those at hand.
    """
    here = jax.default_backend()
    platform = platform or here
    operations = [operation for pattern, operation in tuned.OPERATIONS if pattern == kind]
    if not operations:
        kinds = ", ".join(dict.fromkeys(pattern for pattern, _ in tuned.OPERATIONS))
        raise ValueError(f"kind: {kind!r}, accepted {kinds}")
    name = _KERNELS.get(platform)
    if name is None:
        return dict.fromkeys(operations, Choice("xla", f"there are no kernels for {platform}"))
    device = device or (
        tuned.device_kind() if platform == here else f"a {platform.upper()} elsewhere"
    )
    dtype = jnp.dtype(dtype)
    refusal = BACKENDS[name].refusal(dtype, matrix.width, block)

    def choice(operation: str) -> Choice:
        case = Case(name, kind, operation, str(dtype), block, tokens)
        reason = refusal or tuned.verdict(device, case, matrix, folder)
        return Choice("xla" if reason else name, reason)

    return {operation: choice(operation) for operation in operations}


def choose(implementation: str | None, dtype: jnp.dtype, width: int, block: int) -> str:
    """The key of the backend that does it: None is `Measured`, which does everything. Raises
    `ValueError` where the named one cannot."""
    if implementation is None:
        return _MEASURED
    if implementation not in IMPLEMENTATIONS:
        accepted = ", ".join(IMPLEMENTATIONS)
        raise ValueError(f"implementation: {implementation!r}, accepted {accepted}")
    if reason := IMPLEMENTATIONS[implementation].refusal(jnp.dtype(dtype), width, block):
        raise ValueError(f"implementation {implementation}: {reason}")
    return implementation
