"""Implementation in plain XLA, for every platform and size.

For kept rows it gathers the kept weights and computes a smaller dense product. For a block mask it
computes a dense product of the full matrix, zeros included.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from kernels.block_sparse_matmul.patterns import BlockMask, KeptRows, Pattern
from kernels.block_sparse_matmul.reference import scatter

_SORTED: dict[str, Any] = {"indices_are_sorted": True, "unique_indices": True}


def column(x: Array, w: Array, pattern: Pattern) -> Array:
    """x · Wᵀ."""
    return jnp.matmul(x, _dense(w, pattern).T)


def row(xs: Sequence[Array], ws: Sequence[Array], pattern: Pattern) -> Array:
    """Σ x · W over the pairs (x, W)."""
    products = [_float32_matmul(x, _dense(w, pattern)) for x, w in zip(xs, ws, strict=True)]
    return sum(products[1:], products[0]).astype(xs[0].dtype)


def sampled(a: Array, c: Array, mask: BlockMask) -> Array:
    """aᵀ · c at the blocks of the mask."""
    (rows, columns), block = mask.shape, mask.block
    blocks = jnp.matmul(a.T, c).reshape(rows, block, columns, block).swapaxes(1, 2)
    return blocks[mask.rows, mask.columns]


def swiglu(x: Array, gate: Array, up: Array, pattern: Pattern) -> Array:
    """silu(x · Gᵀ) · (x · Uᵀ)."""
    g, u = (_float32_matmul(x, _dense(w, pattern).T) for w in (gate, up))
    return _activate(g, u).astype(x.dtype)


def swiglu_gradients(
    x: Array, gate: Array, up: Array, dh: Array, pattern: Pattern
) -> tuple[Array, Array, Array]:
    """Return the gradients of x · Gᵀ and x · Uᵀ, and the result of `swiglu`."""
    g, u = (_float32_matmul(x, _dense(w, pattern).T) for w in (gate, up))
    h, vjp = jax.vjp(_activate, g, u)
    dg, du = vjp(dh.astype(jnp.float32))
    return dg.astype(x.dtype), du.astype(x.dtype), h.astype(x.dtype)


def refusal(_dtype: jnp.dtype, _width: int, _block: int) -> str | None:
    """Return None: every dtype and size is supported."""
    return None


def _activate(g: Array, u: Array) -> Array:
    return jax.nn.silu(g) * u


def _float32_matmul(x: Array, w: Array) -> Array:
    return jnp.matmul(x, w, preferred_element_type=jnp.float32)


def _dense(w: Array, pattern: Pattern) -> Array:
    if not isinstance(pattern, KeptRows):
        return scatter(w, pattern)
    blocks = w.reshape(-1, pattern.block, w.shape[1])
    kept = blocks.at[pattern.ids].get(mode="promise_in_bounds", **_SORTED)
    return kept.reshape(-1, w.shape[1])
