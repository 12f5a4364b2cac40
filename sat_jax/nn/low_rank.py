"""Weights of low rank, and the prediction of activations with them.

SparseLoRA (arXiv:2506.16500) scores channels by their outputs with a truncated singular value
decomposition of the weights. Rank r needs O(r · (D + N)) operations per token, not O(D · N).
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sat_jax.nn.linear import Axes, Weight, combine, dense, project

RANK = 8  # as in SparseLoRA
_ITERATIONS = 3


@functools.partial(jax.tree_util.register_dataclass, data_fields=("left", "right"), meta_fields=())
@dataclasses.dataclass(frozen=True)
class LowRank(Weight):
    """A weight `left · right` `[*L, *units, D]` of rank r, whose factors are trained.

    `left` has the axes of units, and is gathered with them. For N units a product needs
    O(r · (D + N)) operations per token.
    """

    left: Float[Array, "*axes r"]
    right: Float[Array, "*L r D"]

    @property
    def rank(self) -> int:
        """The number of columns of `left`."""
        return self.right.shape[-2]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the array that the weight stands for, of one layer or of all."""
        return *self.left.shape[:-1], self.right.shape[-1]

    def dense(self) -> Array:
        """Return the product of the factors, of one layer or of all."""
        left, right = dense(self.left), dense(self.right)
        flat = left.reshape(*right.shape[:-2], -1, self.rank)
        product = jnp.matmul(flat, right, precision=jax.lax.Precision.HIGHEST)
        return product.reshape(self.shape)

    def describe(self, axes: Axes) -> dict[str, tuple[Axes, bool]]:
        """Return the axes of both factors, which are trained."""
        return {
            "left": ((*axes[:-1], "rank"), True),
            "right": ((axes[0], "rank", axes[-1]), True),
        }

    def project(self, x: Float[Array, "B T D"]) -> Array:
        """Return `x · rightᵀ · leftᵀ`, `[B, T, *units]`."""
        return project(self.left, project(self.right, x))

    def project_squares(
        self, x: Float[Array, "B T D"], weight_BT: Float[Array, "B T"]
    ) -> Float[Array, "*units"]:
        """Return the sum over tokens of the squares of `project`, float32. It needs O(r · (D + r))
        operations per token, since no product with all units is formed."""
        z_BTr = project(self.right, x.astype(jnp.float32))
        products = jnp.einsum("BTr,BTs,BT->rs", z_BTr, z_BTr, weight_BT)
        return jnp.einsum("...r,rs,...s->...", self.left, products, self.left)

    def combine(self, a: Array) -> Float[Array, "B T D"]:
        """Return `a · left · right` for activations `[B, T, *units]`."""
        return combine(self.right, combine(self.left, a))


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


def approximation(weight: Float[Array, "*units D"], rank: int = RANK) -> LowRank:
    """Return a low-rank approximation of the weight of one layer, float32."""
    basis, coordinates = low_rank(weight.reshape(-1, weight.shape[-1]), rank)
    return LowRank(coordinates.reshape(*weight.shape[:-1], -1), basis.T)
