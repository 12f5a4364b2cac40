"""Low-rank prediction of activations.

SparseLoRA (arXiv:2506.16500) scores channels by their outputs with a truncated singular value
decomposition of the weights. Rank r needs O(r · (D + N)) operations per token, not O(D · N).
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

RANK = 8  # as in SparseLoRA
_ITERATIONS = 3


def low_rank(
    weight_ND: Float[Array, "N D"], rank: int = RANK
) -> tuple[Float[Array, "D r"], Float[Array, "N r"]]:
    """Return (basis, coordinates) with weight ≈ coordinates · basisᵀ, float32, by a few subspace
    iterations (Halko et al., arXiv:0909.4061).

    The initial vectors are always the same; `rank` is at most the smaller dimension.
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
    """Return x · weightᵀ with a low-rank approximation of the weight, float32."""
    basis, coordinates = low_rank(weight_ND)
    return (x_BTD.astype(jnp.float32) @ basis) @ coordinates.T
