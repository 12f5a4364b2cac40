"""The interface of compression methods: what the pass over the layers knows of them."""

from typing import ClassVar, Literal, NamedTuple, Protocol

from jaxtyping import Array, Float

from sat_jax.compress.input_statistics import InputStatistics, Needs

Saving = Literal["without_zeros", "with_factors"]
"""How the size that a method removes can be saved: products with zeros are left out, or factors are
stored and multiplied in place of their product."""


class Factors(NamedTuple):
    """Two factors of a matrix `[out, in]`, whose product left · right has rank r."""

    left: Float[Array, "out r"]
    right: Float[Array, "r in"]


class Compressed(NamedTuple):
    """A compressed matrix: its new weights, the number of weights that are removed (0, or saved by
    the factors), and the factors of a matrix of low rank."""

    weight: Float[Array, "out in"]
    removed: int
    factors: Factors | None = None


class MatrixMethod(Protocol):
    """A method with its settings, which compresses one matrix `[out, in]` at a time."""

    saving: ClassVar[Saving]

    @property
    def needs(self) -> Needs:
        """The statistics of inputs that the method reads."""

    def check(self, rows: int, columns: int, what: str) -> None:
        """Raise `UserError` if it cannot compress a matrix `what` of this size."""

    def count(self, rows: int, columns: int) -> int:
        """Return how many weights of a matrix of this size are removed."""

    def __call__(self, weight: Float[Array, "out in"], statistics: InputStatistics) -> Compressed:
        """Return the compressed matrix, in the dtype of `weight`."""
