"""What neurons would output if their weights had low rank: a cheap prediction, after SparseLoRA.

SparseLoRA (arXiv:2506.16500) scores channels by their outputs under a truncated singular value
decomposition of the weights. With rank r a token costs O(r · (D + N)) operations, not O(D · N).
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

RANK = 8  # SparseLoRA's
_ITERATIONS = 3


def low_rank(
    weight_ND: Float[Array, "N D"], rank: int = RANK
) -> tuple[Float[Array, "D r"], Float[Array, "N r"]]:
    """(basis, coordinates) with weight ≈ coordinates · basisᵀ, float32: the best such product, but
    for what a few subspace iterations leave undone (Halko et al., arXiv:0909.4061).

    The iterations begin with the same random vectors always; `rank` is cut to the smaller side.
    """
    weight = weight_ND.astype(jnp.float32)
    rank = min(rank, *weight.shape)
    start = jax.random.normal(jax.random.key(0), (weight.shape[1], rank))

    def iterate(basis: Array, _: None) -> tuple[Array, None]:
        return jnp.linalg.qr(weight.T @ (weight @ basis))[0], None

    basis, _ = jax.lax.scan(iterate, jnp.linalg.qr(start)[0], None, length=_ITERATIONS)
    return basis, weight @ basis


def predicted(
    x_BTD: Float[Array, "B T D"], weight_ND: Float[Array, "N D"]
) -> Float[Array, "B T N"]:
    """x · weightᵀ with the weight at low rank, float32."""
    basis, coordinates = low_rank(weight_ND)
    return (x_BTD.astype(jnp.float32) @ basis) @ coordinates.T
