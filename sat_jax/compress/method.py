"""The interface of compression methods: what the pass over the layers knows of them."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, Literal, NamedTuple, Protocol

from jaxtyping import Array, Float

from sat_jax.compress.input_statistics import InputStatistics, Needs

if TYPE_CHECKING:
    import qwix

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

    array: "qwix.QArray"
    input_scale: Float[Array, " in"] | None = None

    def dense(self) -> Float[Array, "out in"]:
        """Return the dequantized matrix."""
        import qwix

        dense: Array = qwix.dequantize(self.array)
        return dense if self.input_scale is None else dense * self.input_scale[None]


class Compressed(NamedTuple):
    """A compressed matrix: its new weights, the number of weights that are removed (0, or saved by
    the factors), the factors of a matrix of low rank, and the integers of a quantized one."""

    weight: Float[Array, "out in"]
    removed: int
    factors: Factors | None = None
    quantized: QuantizedMatrix | None = None


class Varied(NamedTuple):
    """The setting of a method that a budget varies: the values at which the error is measured,
    ascending, and the `step` between the values that matrices may get (None: the measured ones).
    With a step, a matrix may also stay as it is."""

    name: str
    measured: tuple[float, ...]
    step: float | None = None


class MatrixMethod(Protocol):
    """A method with its settings, which compresses one matrix `[out, in]` at a time."""

    varied: ClassVar[Varied]

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


class ByMatrix(NamedTuple):
    """A method whose varied setting differs: by path and layer, None where a matrix stays as it is.
    All read the same statistics, those that `needs` names."""

    methods: Mapping[str, Sequence[MatrixMethod | None]]
    needs: Needs


def method_of(method: MatrixMethod | ByMatrix, path: str, layer: int) -> MatrixMethod | None:
    """Return the method of one matrix, or None if it stays as it is."""
    return method.methods[path][layer] if isinstance(method, ByMatrix) else method
