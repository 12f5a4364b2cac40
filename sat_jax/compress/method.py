"""The interface of compression methods: what the pass over the layers knows of them."""

from typing import ClassVar, Literal, NamedTuple, Protocol

import qwix
from jaxtyping import Array, Float

from sat_jax.compress.input_statistics import InputStatistics, Needs

Saving = Literal["without_zeros", "with_factors"]
"""How the size that a method removes can be saved: products with zeros are left out, or factors are
stored and multiplied in place of their product."""


class Factors(NamedTuple):
    """Two factors of a matrix `[out, in]`, whose product left · right has rank r."""

    left: Float[Array, "out r"]
    right: Float[Array, "r in"]


class QuantizedMatrix(NamedTuple):
    """A matrix `[out, in]` of int4, int8 or NormalFloat with a scale `[out, groups]`. With an
    `input_scale`, the weights of each input are multiplied by it."""

    array: qwix.QArray
    input_scale: Float[Array, " in"] | None = None

    def dense(self) -> Float[Array, "out in"]:
        """Return the dequantized matrix."""
        dense: Array = qwix.dequantize(self.array)
        return dense if self.input_scale is None else dense * self.input_scale[None]


class Compressed(NamedTuple):
    """A compressed matrix: its new weights, the number of weights that are removed (0, or saved by
    the factors), the factors of a matrix of low rank, and the integers of a quantized one."""

    weight: Float[Array, "out in"]
    removed: int
    factors: Factors | None = None
    quantized: QuantizedMatrix | None = None


class MatrixMethod(Protocol):
    """A method with its settings, which compresses one matrix `[out, in]` at a time."""

    @property
    def needs(self) -> Needs:
        """The statistics of inputs that the method reads."""

    def check(self, rows: int, columns: int, what: str) -> None:
        """Raise `UserError` if it cannot compress a matrix `what` of this size."""

    def __call__(self, weight: Float[Array, "out in"], statistics: InputStatistics) -> Compressed:
        """Return the compressed matrix, in the dtype of `weight`."""


class RemovingMethod(MatrixMethod, Protocol):
    """A method that removes weights."""

    saving: ClassVar[Saving]

    def count(self, rows: int, columns: int) -> int:
        """Return how many weights of a matrix of this size are removed."""
