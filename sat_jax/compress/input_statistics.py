"""Statistics of the inputs of a matrix, which all methods that calibrate share."""

import dataclasses
from functools import cached_property
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float

Needs = Literal["nothing", "squares", "gram"]
"""The statistics that a method reads: none, `InputStatistics.squares`, or also its `gram`."""

DAMPING = 0.01
"""Share of the mean diagonal of a Gram matrix that is added to its diagonal before it is inverted,
as in the published code of SparseGPT and GPTQ."""


@dataclasses.dataclass(frozen=True)
class InputStatistics:
    """Sums over the tokens x of the inputs of a matrix `[out, in]`, in float64.

    `squares` is Σ x², and `gram` is Σ x xᵀ (of inputs `[tokens, in]`: inputsᵀ · inputs), or None if
    no method needs it. Statistics of several batches are added.
    """

    tokens: int
    squares: Float[np.ndarray, " in"]
    gram: Float[np.ndarray, "in in"] | None = None

    @classmethod
    def of_inputs(
        cls, inputs: Float[ArrayLike, "tokens in"], needs: Needs = "gram"
    ) -> "InputStatistics":
        """Return the statistics of these inputs."""
        x = np.asarray(inputs, np.float64)
        if needs == "gram":
            return cls.of_gram(len(x), x.T @ x)
        return cls(len(x), np.einsum("ti,ti->i", x, x))

    @classmethod
    def of_gram(cls, tokens: int, gram: Float[ArrayLike, "in in"]) -> "InputStatistics":
        """Return the statistics of inputs with this Gram matrix."""
        gram = np.asarray(gram, np.float64)
        return cls(tokens, gram.diagonal().copy(), gram)

    @cached_property
    def inverse_factor(self) -> Float[np.ndarray, "in in"]:
        """The upper triangular U with Uᵀ · U = (gram + damping)⁻¹, in float64.

        It is U = R⁻¹ with gram + damping = R · Rᵀ, so that the matrix itself is not inverted.
        Float32 would not be enough for the Gram matrices of large models. The diagonal is 1 where
        all inputs are 0.
        """
        assert self.gram is not None
        damped = self.gram.copy()
        diagonal = np.einsum("ii->i", damped)  # a view
        diagonal[diagonal == 0] = 1
        diagonal += DAMPING * diagonal.mean()
        with jax.enable_x64(True):
            return np.asarray(_inverse_factor(jnp.asarray(damped)))

    def __add__(self, other: "InputStatistics") -> "InputStatistics":
        gram = None if self.gram is None or other.gram is None else self.gram + other.gram
        return InputStatistics(self.tokens + other.tokens, self.squares + other.squares, gram)


@jax.jit
def _inverse_factor(matrix: Float[Array, "n n"]) -> Float[Array, "n n"]:
    """Return R⁻¹ of a positive definite matrix R · Rᵀ, R upper triangular: in reverse order of rows
    and columns, R is the lower triangular Cholesky factor."""
    lower = jnp.linalg.cholesky(matrix[::-1, ::-1])
    identity = jnp.eye(len(matrix), dtype=matrix.dtype)
    return jax.lax.linalg.triangular_solve(lower, identity, left_side=True, lower=True)[::-1, ::-1]
