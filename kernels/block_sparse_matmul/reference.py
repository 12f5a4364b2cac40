"""Reference implementations, which define the operations: dense products of the expanded matrix.

Every backend is tested against these functions. Sums and activations are computed in float32 and
rounded once, to the dtype of the first operand.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels.block_sparse_matmul.patterns import BlockMask, KeptRows, Pattern

Activation = Literal["gelu", "gelu_new"]
ACTIVATIONS: Mapping[Activation, Callable[[Array], Array]] = {
    "gelu": functools.partial(jax.nn.gelu, approximate=False),  # x Φ(x)
    "gelu_new": jax.nn.gelu,  # its tanh approximation (Hendrycks and Gimpel, arXiv:1606.08415)
}


def column(x: Float[Array, "T D"], w: Array, pattern: Pattern) -> Float[Array, "T N"]:
    """x · Wᵀ."""
    return _product(x, dense(w, pattern).T).astype(x.dtype)


def row(x: Float[Array, "T N"], w: Array, pattern: Pattern) -> Float[Array, "T D"]:
    """x · W."""
    return _product(x, dense(w, pattern)).astype(x.dtype)


def sampled(a: Float[Array, "T N"], c: Float[Array, "T D"], pattern: Pattern) -> Array:
    """aᵀ · c at the blocks of the pattern."""
    product = _product(a.T, c).astype(a.dtype)
    if isinstance(pattern, KeptRows):
        return product
    (rows, columns), block = pattern.shape, pattern.block
    blocks = product.reshape(rows, block, columns, block).swapaxes(1, 2)
    return blocks[pattern.rows, pattern.columns]


def swiglu(x: Float[Array, "T D"], gate: Array, up: Array, pattern: Pattern) -> Float[Array, "T N"]:
    """silu(x · Gᵀ) · (x · Uᵀ)."""
    g, u = (_product(x, dense(w, pattern).T) for w in (gate, up))
    return (jax.nn.silu(g) * u).astype(x.dtype)


def swiglu_mlp(
    x: Float[Array, "T D"], gate: Array, up: Array, down: Array, pattern: Pattern
) -> Float[Array, "T D"]:
    """(silu(x · Gᵀ) · (x · Uᵀ)) · W."""
    return row(swiglu(x, gate, up, pattern), down, pattern)


def gelu_mlp(
    x: Float[Array, "T D"],
    up: Array,
    bias: Float[Array, " F"],
    down: Array,
    up_mask: BlockMask,
    down_mask: BlockMask,
    *,
    activation: Activation,
) -> Float[Array, "T D"]:
    """activation(x · Uᵀ + bias) · W."""
    h = ACTIVATIONS[activation](_product(x, dense(up, up_mask).T) + bias[None])
    return row(h.astype(x.dtype), down, down_mask)


def dense(w: Array, pattern: Pattern) -> Float[Array, "N D"]:
    """Return the kept rows of the matrix, or the full matrix with zeros outside the mask."""
    if isinstance(pattern, KeptRows):
        return w[_rows(pattern)]
    return scatter(w, pattern)


def scatter(w: Float[Array, "nonzero b b"], mask: BlockMask) -> Float[Array, "R C"]:
    """Return the dense matrix of the stored blocks."""
    (rows, columns), block = mask.shape, mask.block
    blocks = jnp.zeros((rows, columns, block, block), w.dtype)
    blocks = blocks.at[mask.rows, mask.columns].set(w)
    return blocks.swapaxes(1, 2).reshape(rows * block, columns * block)


def _rows(pattern: KeptRows) -> Array:
    offsets = jnp.arange(pattern.block, dtype=jnp.int32)
    return (pattern.ids[:, None] * pattern.block + offsets[None]).reshape(-1)


def _product(a: Array, b: Array) -> Array:
    return jnp.matmul(a, b, preferred_element_type=jnp.float32, precision="highest")
