"""Statistics of the inputs of a matrix, which all methods that calibrate share."""

import dataclasses
from functools import cached_property
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float

from sat_jax.errors import UserError

Needs = Literal["nothing", "squares", "magnitudes", "gram"]
"""The statistics that a method reads: none, `InputStatistics.squares`, or also its `magnitudes` or
its `gram`."""

DAMPING = 0.01
"""Share of the mean diagonal of a Gram matrix that is added to its diagonal before it is inverted,
as in the published code of SparseGPT and GPTQ."""


@dataclasses.dataclass(frozen=True)
class InputStatistics:
    """Sums over the tokens x of the inputs of a matrix `[out, in]`, in float64.

    `squares` is Σ x², `magnitudes` is Σ |x|, and `gram` is Σ x xᵀ (of inputs `[tokens, in]`:
    inputsᵀ · inputs); the latter two are None if no method needs them. Statistics of several
    batches are added.
    """

    tokens: int
    squares: Float[np.ndarray, " in"]
    gram: Float[np.ndarray, "in in"] | None = None
    magnitudes: Float[np.ndarray, " in"] | None = None

    @classmethod
    def of_inputs(
        cls, inputs: Float[ArrayLike, "tokens in"], needs: Needs = "gram"
    ) -> "InputStatistics":
        """Return the statistics of these inputs."""
        x = np.asarray(inputs, np.float64)
        if needs == "gram":
            return cls.of_gram(len(x), x.T @ x)
        magnitudes = np.abs(x).sum(axis=0) if needs == "magnitudes" else None
        return cls(len(x), np.einsum("ti,ti->i", x, x), magnitudes=magnitudes)

    @classmethod
    def of_gram(cls, tokens: int, gram: Float[ArrayLike, "in in"]) -> "InputStatistics":
        """Return the statistics of inputs with this Gram matrix."""
        gram = np.asarray(gram, np.float64)
        return cls(tokens, gram.diagonal().copy(), gram)

    @cached_property
    def factor(self) -> Float[np.ndarray, "in in"]:
        """The upper triangular R with R · Rᵀ = gram + damping, in float64."""
        with jax.enable_x64(True):
            return np.asarray(_factor(jnp.asarray(self._damped_gram())))

    @cached_property
    def inverse_factor(self) -> Float[np.ndarray, "in in"]:
        """The upper triangular U with Uᵀ · U = (gram + damping)⁻¹, in float64.

        It is U = R⁻¹ with the `factor` R, so that the matrix itself is not inverted. Float32 would
        not be enough for the Gram matrices of large models.
        """
        with jax.enable_x64(True):
            return np.asarray(_inverse_factor(jnp.asarray(self._damped_gram())))

    def _damped_gram(self) -> Float[np.ndarray, "in in"]:
        """Return gram + damping, with a diagonal of 1 before damping where all inputs are 0."""
        assert self.gram is not None
        damped = self.gram.copy()
        diagonal = np.einsum("ii->i", damped)  # a view
        diagonal[diagonal == 0] = 1
        diagonal += DAMPING * diagonal.mean()
        return damped

    def __add__(self, other: "InputStatistics") -> "InputStatistics":
        return InputStatistics(
            self.tokens + other.tokens,
            self.squares + other.squares,
            _sum(self.gram, other.gram),
            _sum(self.magnitudes, other.magnitudes),
        )


def statistics_of(
    weight: Float[ArrayLike, "out in"], inputs: Float[ArrayLike, "tokens in"], needs: Needs
) -> InputStatistics:
    """Return the statistics of the inputs of a matrix. Raises `UserError` for other shapes, and for
    inputs that are not finite."""
    shapes = np.shape(weight), np.shape(inputs)
    if [len(shape) for shape in shapes] != [2, 2] or shapes[0][1] != shapes[1][1]:
        raise UserError(
            f"weight {list(shapes[0])} and inputs {list(shapes[1])}; accepted: [out, in] and"
            " [tokens, in]"
        )
    if not np.isfinite(np.asarray(inputs, np.float32)).all():
        raise UserError("inputs have values that are not finite; accepted: finite numbers")
    return InputStatistics.of_inputs(inputs, needs)


def _sum(a: np.ndarray | None, b: np.ndarray | None) -> np.ndarray | None:
    return None if a is None or b is None else a + b


@jax.jit
def _factor(matrix: Float[Array, "n n"]) -> Float[Array, "n n"]:
    """Return R of a positive definite matrix R · Rᵀ, R upper triangular: in reverse order of rows
    and columns, R is the lower triangular Cholesky factor."""
    return jnp.linalg.cholesky(matrix[::-1, ::-1])[::-1, ::-1]


@jax.jit
def _inverse_factor(matrix: Float[Array, "n n"]) -> Float[Array, "n n"]:
    """Return R⁻¹ of a positive definite matrix R · Rᵀ, R upper triangular."""
    identity = jnp.eye(len(matrix), dtype=matrix.dtype)
    return jax.lax.linalg.triangular_solve(_factor(matrix), identity, left_side=True, lower=False)
