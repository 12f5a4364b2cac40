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


def predicted_channels(
    x_BTD: Float[Array, "B T D"], gate_FD: Float[Array, "F D"], up_FD: Float[Array, "F D"]
) -> Float[Array, "B T F"]:
    """Every channel's activation, gate and up projection at low rank."""
    return jax.nn.silu(predicted(x_BTD, gate_FD)) * predicted(x_BTD, up_FD)


def predicted_values(
    x_BTD: Float[Array, "B T D"], value_KED: Float[Array, "K E D"], query_heads: int
) -> Float[Array, "B T K G E"]:
    """Every head's value at low rank, in the place of its mix: as if each token attended to itself,
    since the weights of attention are what a cheap prediction cannot know."""
    groups, size, width = value_KED.shape
    flat = predicted(x_BTD, value_KED.reshape(groups * size, width))
    value_BTKE = flat.reshape(*x_BTD.shape[:2], groups, size)
    return jnp.broadcast_to(value_BTKE[:, :, :, None], (*value_BTKE.shape[:3], query_heads, size))
