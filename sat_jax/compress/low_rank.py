"""Low rank: SVD, activation-aware (ASVD) and whitened (SVD-LLM).

Each method truncates the singular value decomposition of W · S, and multiplies the right factor by
S⁻¹. The methods differ in S: the identity, the size of each input, or a factor of the Gram matrix
of the inputs.
"""

import dataclasses
from collections.abc import Callable
from typing import ClassVar, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float

from sat_jax.compress.input_statistics import InputStatistics, Needs, statistics_of
from sat_jax.compress.method import Compressed, Factors, Saving, Varied
from sat_jax.errors import UserError

ALPHA = 0.5  # the exponent of ASVD, as in the paper
_Pair = tuple[Float[np.ndarray, "out r"], Float[np.ndarray, "r in"]]


class Method(NamedTuple):
    """A low-rank method: the statistics that it reads, and the factors of a matrix and a rank."""

    needs: Needs
    factorize: Callable[[np.ndarray, InputStatistics, int], _Pair]


def _svd(weight: np.ndarray, _: InputStatistics, rank: int) -> _Pair:
    return _truncated_svd(weight, rank)


def _asvd(weight: np.ndarray, statistics: InputStatistics, rank: int) -> _Pair:
    """S is diagonal: mean |x| to the power `ALPHA` (Yuan et al., arXiv:2312.05821, section 3). The
    weights of inputs that are all 0 become 0."""
    assert statistics.magnitudes is not None
    scale = (statistics.magnitudes / statistics.tokens) ** ALPHA
    left, right = _truncated_svd(weight * scale, rank)
    return left, np.divide(right, scale, out=np.zeros_like(right), where=scale > 0)


def _svd_llm(weight: np.ndarray, statistics: InputStatistics, rank: int) -> _Pair:
    """S is a Cholesky factor of the damped Gram matrix (Wang et al., arXiv:2403.07378, section
    3.1). Without damping, the error of the output is exactly the norm of the singular values that
    are dropped, and no matrix of this rank has a smaller one."""
    left, right = _truncated_svd(weight @ statistics.factor, rank)
    return left, right @ statistics.inverse_factor


def _truncated_svd(matrix: np.ndarray, rank: int) -> _Pair:
    """Return factors of the nearest matrix of this rank; both have the roots of the singular
    values.

    The left singular vectors are eigenvectors of matrix · matrixᵀ, for which LAPACK is several
    times faster than for an SVD. In float64, they are exact for singular values above about 1e-8 of
    the largest, which float32 does not resolve.
    """
    if len(matrix) > matrix.shape[1]:
        left, right = _truncated_svd(matrix.T, rank)
        return right.T, left.T
    left = np.linalg.eigh(matrix @ matrix.T).eigenvectors[:, : -rank - 1 : -1]
    right = left.T @ matrix
    values = np.linalg.norm(right, axis=1)
    roots = np.sqrt(np.where(values > 0, values, 1))
    return left * roots, right / roots[:, None]


LOW_RANK: dict[str, Method] = {
    "svd": Method("nothing", _svd),
    "asvd": Method("magnitudes", _asvd),
    "svd-llm": Method("gram", _svd_llm),
}


@dataclasses.dataclass(frozen=True)
class Factorization:
    """A low-rank method with its settings, to be called with a matrix `[out, in]`.

    `ratio` is the share of a matrix's weights that its factors have: the rank is
    ⌊ratio · out · in / (out + in)⌋, at least 1. Raises `UserError` for settings that are not
    accepted.
    """

    method: str
    ratio: float = 0.8
    saving: ClassVar[Saving] = "with_factors"
    varied: ClassVar[Varied] = Varied("ratio", (0.2, 0.4, 0.6, 0.8, 0.9), 0.02)

    def __post_init__(self) -> None:
        if self.method not in LOW_RANK:
            raise UserError(f"method {self.method!r}; accepted: {', '.join(LOW_RANK)}")
        if not 0 < self.ratio < 1:
            raise UserError(
                f"ratio {self.ratio:g}; accepted: a share between 0 and 1 (with 1 and more, factors"
                " save nothing)"
            )

    @property
    def needs(self) -> Needs:
        """The statistics of inputs that the method reads."""
        return LOW_RANK[self.method].needs

    def rank(self, rows: int, columns: int) -> int:
        """Return the rank of a matrix of this size."""
        return max(1, int(self.ratio * rows * columns / (rows + columns)))

    def check(self, rows: int, columns: int, what: str) -> None:
        """Raise `UserError` if the factors of a matrix of this size save nothing."""
        if self.count(rows, columns) <= 0:
            raise UserError(
                f"ratio {self.ratio:g}: {what} is {rows} × {columns}, and factors of rank 1 have"
                f" {rows + columns} weights; accepted: matrices that have more"
            )

    def count(self, rows: int, columns: int) -> int:
        """Return how many weights fewer the factors have than a matrix of this size."""
        return rows * columns - self.rank(rows, columns) * (rows + columns)

    def __call__(
        self, weight: Float[ArrayLike, "out in"], statistics: InputStatistics
    ) -> Compressed:
        """Return the product of the factors, and the factors, in the dtype of `weight`. They are
        computed in float64."""
        values = jnp.asarray(weight)
        rank = self.rank(*values.shape)
        left, right = LOW_RANK[self.method].factorize(
            np.asarray(values, np.float64), statistics, rank
        )

        def rounded(array: np.ndarray) -> Array:
            return jnp.asarray(array, values.dtype)

        factors = Factors(rounded(left), rounded(right))
        return Compressed(rounded(left @ right), self.count(*values.shape), factors)


def factorize_matrix(
    weight: Float[ArrayLike, "out in"],
    inputs: Float[ArrayLike, "tokens in"],
    method: str = "svd-llm",
    ratio: float = 0.8,
) -> Factors:
    """Return factors of one matrix W, whose outputs are inputs · Wᵀ, in its dtype (float32 for
    float64).

    `method`: svd, asvd or svd-llm. `ratio` as in `Factorization`. Raises `UserError` for settings
    or shapes that are not accepted, and for inputs that are not finite.
    """
    factorization = Factorization(method, ratio)
    statistics = statistics_of(weight, inputs, factorization.needs)
    rows, columns = np.shape(weight)
    factorization.check(rows, columns, "weight")
    factors = factorization(weight, statistics).factors
    assert factors is not None
    return factors
