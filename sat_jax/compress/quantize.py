"""Quantization after training: round to nearest, GPTQ, AWQ and NormalFloat.

Integers are symmetric: a group of weights has one scale, the largest |w| over 7.5 (4 bits) or 127.5
(8 bits), as in `qwix.quantize`, and integers from -8 to 7 or -128 to 127. Levels of NormalFloat are
from -1 to 1, and the scale is the largest |w|.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float

from sat_jax.compress.elimination import (
    Columns,
    Triangle,
    eliminate_block,
    eliminate_columns,
)
from sat_jax.compress.input_statistics import InputStatistics, Needs, statistics_of
from sat_jax.compress.method import Compressed, QuantizedMatrix, Varied
from sat_jax.errors import UserError
from sat_jax.nn.quantized import NORMAL_FLOAT, Bits, Packing, round_to_nearest

if TYPE_CHECKING:
    import qwix

AWQ_GRID = 20  # exponents from 0 to 1, as many as in the publication
_SMALLEST = 1e-4  # size of an input relative to the largest one, below which AWQ does not go
_GPTQ_COLUMNS = 128  # that are eliminated at once, if each row has one scale


class Method(NamedTuple):
    """A quantization method: the statistics that it reads, and the quantized matrix. `inputs`: the
    number of weights with one scale."""

    needs: Needs
    quantize: Callable[[Array, InputStatistics, Bits, int], QuantizedMatrix]


def _rtn(weight: Array, _: InputStatistics, bits: Bits, inputs: int) -> QuantizedMatrix:
    return QuantizedMatrix(_nearest(weight, bits, inputs))


def _nf4(weight: Array, _: InputStatistics, bits: Bits, inputs: int) -> QuantizedMatrix:
    """The nearest of 16 levels, which are quantiles of a normal distribution (QLoRA,
    arXiv:2305.14314, section 3)."""
    del bits
    return QuantizedMatrix(_nearest(weight, "nf4", inputs))


def _gptq(weight: Array, statistics: InputStatistics, bits: Bits, inputs: int) -> QuantizedMatrix:
    """Column after column is rounded, and those to its right make up for the error (Frantar et al.,
    arXiv:2210.17323). The scale of a group is that of its weights after all columns before it."""
    factor = jnp.asarray(statistics.inverse_factor, jnp.float32)
    weight = jnp.where(jnp.asarray(statistics.squares == 0)[None], 0, weight)
    columns = weight.shape[1]
    row_scale = _nearest(weight, bits, columns).scale if inputs == columns else None
    step = inputs if row_scale is None else _GPTQ_COLUMNS
    scales = []
    for start in range(0, columns, step):
        width = min(step, columns - start)
        weight, scale = _round_block(weight, factor, row_scale, start, width=width, bits=bits)
        scales.append(scale)
    scale = jnp.concatenate(scales, axis=1) if row_scale is None else row_scale
    # The weights are multiples of their scales already, but for errors of float32.
    groups = weight.reshape(*scale.shape, inputs)
    values = _integers(groups, scale[..., None], bits).reshape(weight.shape)
    import qwix

    return QuantizedMatrix(qwix.QArray(values.astype(_dtype(bits)), scale))


@functools.partial(jax.jit, static_argnames=("width", "bits"))
def _round_block(
    weight: Float[Array, "out in"],
    factor: Float[Array, "in in"],
    scale: Float[Array, "out 1"] | None,
    start: int,
    *,
    width: int,
    bits: Bits,
) -> tuple[Float[Array, "out in"], Float[Array, "out 1"]]:
    """Round the columns [start, start + width), with one scale of each row (None: their own);
    return all weights, and these scales."""

    def eliminate(columns: Columns, triangle: Triangle) -> tuple[Columns, Array]:
        scales = _nearest(columns, bits, width).scale if scale is None else scale

        def rounded(column: Array, _: Array) -> Array:
            return _integers(column, scales[:, 0], bits) * scales[:, 0]

        _, errors = eliminate_columns(columns, jnp.zeros_like(columns), triangle, 0, width, rounded)
        return errors, scales

    return eliminate_block(weight, factor, start, width, eliminate)


def _awq(weight: Array, statistics: InputStatistics, bits: Bits, inputs: int) -> QuantizedMatrix:
    """The weights of an input are multiplied by a power of its size before they are rounded, and
    divided by it after (Lin et al., arXiv:2306.00978, section 3.2).

    Of `AWQ_GRID` exponents from 0 (round to nearest) to 1, that with the smallest error of the
    outputs. The size is the root mean square of the input; the publication has mean |x|.
    """
    sizes = np.sqrt(statistics.squares)
    sizes = np.clip(sizes / max(sizes.max(), np.finfo(float).tiny), _SMALLEST, None)
    gram = jnp.asarray(statistics.gram, jnp.float32)
    candidates = []
    for exponent in np.linspace(0, 1, AWQ_GRID):
        powers = sizes**exponent
        powers = jnp.asarray(powers / np.sqrt(powers.max() * powers.min()), jnp.float32)
        candidates.append((float(_scaled_error(weight, powers, gram, bits, inputs)), powers))
    _, powers = min(candidates, key=lambda candidate: candidate[0])
    return _scaled(weight, powers, bits, inputs)


@functools.partial(jax.jit, static_argnames=("bits", "inputs"))
def _scaled(weight: Array, powers: Array, bits: Bits, inputs: int) -> QuantizedMatrix:
    return QuantizedMatrix(_nearest(weight * powers[None], bits, inputs), 1 / powers)


@functools.partial(jax.jit, static_argnames=("bits", "inputs"))
def _scaled_error(weight: Array, powers: Array, gram: Array, bits: Bits, inputs: int) -> Array:
    """Return the sum of squares of the change of the outputs."""
    change = _scaled(weight, powers, bits, inputs).dense() - weight
    return jnp.vdot(jnp.matmul(change, gram, precision=jax.lax.Precision.HIGHEST), change)


@functools.partial(jax.jit, static_argnames=("bits", "inputs"))
def _nearest(weight: Array, bits: Bits | Literal["nf4"], inputs: int) -> "qwix.QArray":
    """Return the weights rounded to nearest, with a scale `[out, groups]`."""
    return round_to_nearest(weight, bits, 1, inputs)


@jax.jit
def _dense(matrix: QuantizedMatrix) -> Array:
    return matrix.dense()


def _dtype(bits: Bits) -> Any:
    return jnp.int4 if bits == 4 else jnp.int8


def _integers(weight: Array, scale: Array, bits: Bits) -> Array:
    """Return the nearest integers of this many bits, in the dtype of `weight`."""
    bound = 2 ** (bits - 1)
    return jnp.clip(jnp.round(weight / scale), -bound, bound - 1)


QUANTIZATION: dict[str, Method] = {
    "rtn": Method("nothing", _rtn),
    "gptq": Method("gram", _gptq),
    "awq": Method("gram", _awq),
    NORMAL_FLOAT: Method("nothing", _nf4),
}


@dataclasses.dataclass(frozen=True)
class Quantization:
    """A quantization method with its settings, to be called with a matrix `[out, in]`.

    `bits`: 4 or 8. `group`: the number of consecutive inputs of an output that have one scale; 0:
    all inputs. Raises `UserError` for settings that are not accepted.
    """

    method: str
    bits: Bits = 4
    group: int = 128
    varied: ClassVar[Varied] = Varied("bits", (4, 8))

    def __post_init__(self) -> None:
        if self.method not in QUANTIZATION:
            raise UserError(f"method {self.method!r}; accepted: {', '.join(QUANTIZATION)}")
        if self.bits not in get_args(Bits):
            raise UserError(f"bits {self.bits}; accepted: {' or '.join(map(str, get_args(Bits)))}")
        if self.method == NORMAL_FLOAT and self.bits != 4:
            raise UserError(f"bits {self.bits}: {NORMAL_FLOAT} has 16 levels; accepted: 4")
        if self.group < 0:
            raise UserError(f"group {self.group}; accepted: a number of inputs, or 0 for all")

    @property
    def needs(self) -> Needs:
        """The statistics of inputs that the method reads."""
        return QUANTIZATION[self.method].needs

    @property
    def file_settings(self) -> dict[str, Any]:
        """The settings that a file of the quantized model has (`interop.quantized`)."""
        return {"method": self.method, **self.packing._asdict()}

    @property
    def packing(self) -> Packing:
        """How matrices are stored."""
        return Packing(self.bits, self.group, self.method == "awq", self.method == NORMAL_FLOAT)

    def check(self, rows: int, columns: int, what: str) -> None:
        """Raise `UserError` if a matrix of this size cannot be quantized."""
        if self.group and columns % self.group:
            fits = max(n for n in range(1, min(self.group, columns) + 1) if columns % n == 0)
            raise UserError(
                f"group {self.group}: {what} has {columns} columns; accepted: divisors, such as"
                f" {fits}, or 0 for one scale of each row"
            )
        if self.bits == 4 and (rows % 2 or columns % 2):
            raise UserError(
                f"bits 4: {what} is {rows} × {columns}; accepted: even numbers, since two weights"
                " share a byte"
            )

    def bytes(self, rows: int, columns: int) -> int:
        """Return the size of a quantized matrix: integers, and scales in float32."""
        scales = rows * columns // (self.group or columns) + columns * self.packing.input_scale
        return rows * columns * self.bits // 8 + 4 * scales

    def __call__(
        self, weight: Float[ArrayLike, "out in"], statistics: InputStatistics
    ) -> Compressed:
        """Return the quantized matrix, and its dequantized weights in the dtype of `weight`."""
        values = jnp.asarray(weight)
        matrix = self.quantize(values, statistics)
        return Compressed(_dense(matrix).astype(values.dtype), 0, quantized=matrix)

    def quantize(
        self, weight: Float[Array, "out in"], statistics: InputStatistics
    ) -> QuantizedMatrix:
        """Return the quantized matrix alone."""
        method = QUANTIZATION[self.method]
        inputs = self.group or weight.shape[1]
        return method.quantize(weight.astype(jnp.float32), statistics, self.bits, inputs)


def quantize_matrix(
    weight: Float[ArrayLike, "out in"],
    inputs: Float[ArrayLike, "tokens in"],
    method: str = "gptq",
    bits: Bits = 4,
    group: int = 128,
) -> QuantizedMatrix:
    """Quantize one matrix W, whose outputs are inputs · Wᵀ.

    `method`: rtn, gptq, awq or nf4. `bits` and `group` as in `Quantization`. `dense()` of the
    result is float32 `[out, in]`. Raises `UserError` for settings or shapes that are not accepted,
    and for inputs that are not finite.
    """
    quantization = Quantization(method, bits, group)
    statistics = statistics_of(weight, inputs, quantization.needs)
    rows, columns = np.shape(weight)
    quantization.check(rows, columns, "weight")
    return quantization.quantize(jnp.asarray(weight), statistics)
