"""Weights in 4 or 8 bits, which are dequantized one matrix at a time when they are used."""

import dataclasses
import functools
import math
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Int8, UInt8

from sat_jax.nn.linear import Axes
from sat_jax.nn.own_gradient import OwnGradient
from sat_jax.nn.param import EMBED_PAIR

# Imported where it is used: steps without quantized weights are measured on machines without it.
if TYPE_CHECKING:
    import qwix

Bits = Literal[4, 8]
NORMAL_FLOAT = "nf4"
"""The name of 4-bit NormalFloat, in qwix too."""


class Packing(NamedTuple):
    """How the matrices of the layers of a model are stored: the bits of a value, the number of
    consecutive inputs of an output that have one scale (0: all), whether each input has a scale
    too, and whether values are levels of NormalFloat instead of integers."""

    bits: Bits
    group: int
    input_scale: bool = False
    normal_float: bool = False

    @property
    def format(self) -> str:
        """int4, int8 or nf4."""
        return NORMAL_FLOAT if self.normal_float else f"int{self.bits}"

    def abstract(self, shape: tuple[int, ...], writes: bool) -> "Quantized":
        """Return the weight for arrays `[L, *units, D]` of this shape, with abstract arrays."""
        layers, *units, width = shape
        columns = math.prod(units) if writes else width
        groups = columns // (self.group or columns)
        inputs = shape[:-1] if writes else (layers, width)
        array: Any = jax.ShapeDtypeStruct
        values = (*shape[:-1], width * self.bits // 8)
        scale = (layers, groups, width) if writes else (layers, *units, groups)
        return Quantized(
            array(values, jnp.uint8 if self.bits == 4 else jnp.int8),
            array(scale, jnp.float32),
            array(inputs, jnp.float32) if self.input_scale else None,
            writes,
            self.normal_float,
        )


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("values", "scale", "input_scale"),
    meta_fields=("writes", "normal_float"),
)
@dataclasses.dataclass(frozen=True)
class Quantized(OwnGradient):
    """A frozen weight `[*L, *units, D]`: integers times the scale of their group. For the backward
    pass these are saved, and not the dequantized weight.

    A group is `in / groups` consecutive inputs of one output. Inputs are the last axis; those of a
    weight that `writes` to the residual stream are all units, flattened, and `scale` is
    `[*L, groups, D]`. Integers of 8 bits are int8 `values`. Those of 4 bits are uint8, two in each
    (`pack`), so that all devices store them in half a byte. With an `input_scale` (AWQ), `[*L, D]`
    or, where the weight `writes`, `[*L, *units]`, the weights of each input are multiplied by it.
    With `normal_float`, integers are indices, from 0 to 15, of the levels of NormalFloat (QLoRA,
    arXiv:2305.14314, appendix E), which are multiplied by the scale.
    """

    values: Int8[Array, "*axes"] | UInt8[Array, "*half_axes"]
    scale: Float[Array, "*axes groups"] | Float[Array, "*L groups D"]
    input_scale: Float[Array, "*inputs"] | None = None
    writes: bool = False
    normal_float: bool = False
    float32: ClassVar[tuple[str, ...]] = ("scale", "input_scale")

    @property
    def bits(self) -> Bits:
        """Number of bits of an integer."""
        return 4 if self.values.dtype == jnp.uint8 else 8

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the array that the weight stands for, of one layer or of all."""
        *lead, width = self.values.shape
        return *lead, width * 8 // self.bits

    def dense(self) -> Array:
        """Return the dequantized array in float32, of one layer or of all."""
        values: Array = self.values
        if self.bits == 4:
            values = _unpack_levels(values) if self.normal_float else unpack(values)
        # The units of a weight that writes become one axis, that of `scale`.
        rows = values.reshape(*self.scale.shape[:-2], -1, self.shape[-1])
        import qwix

        array = qwix.QArray(rows, self.scale, qtype=NORMAL_FLOAT if self.normal_float else None)
        dense = qwix.dequantize(array).reshape(self.shape)
        if self.input_scale is None:
            return dense
        lead, width = self.input_scale.shape[:-1], self.input_scale.shape[-1]
        if self.writes:
            return dense * self.input_scale[..., None]
        units = (1,) * (dense.ndim - self.input_scale.ndim)
        return dense * self.input_scale.reshape(*lead, *units, width)

    def widened(self) -> "Quantized":
        """Return the weight with integers of 4 bits stored in 8."""
        return self if self.bits == 8 else dataclasses.replace(self, values=unpack(self.values))

    def describe(self, axes: Axes) -> dict[str, tuple[Axes, bool]]:
        """Return the axes of each array; none is trained."""
        layer, *units, width = axes
        scale = (layer, "group", width) if self.writes else (layer, *units, "group")
        values = (layer, *units, EMBED_PAIR) if self.bits == 4 else axes
        arrays: dict[str, tuple[Axes, bool]] = {"values": (values, False), "scale": (scale, False)}
        if self.input_scale is not None:
            arrays["input_scale"] = (axes[:-1] if self.writes else (layer, width), False)
        return arrays

    def gradient(self, x: Float[Array, "B T D"], a: Array) -> None:
        """Return no cotangent."""
        del x, a


def round_to_nearest(
    weight: Array, levels: Bits | Literal["nf4"], axis: int, inputs: int
) -> "qwix.QArray":
    """Return the weight rounded to the nearest of these levels, with a scale for each `inputs`
    consecutive ones along `axis`: the largest |w| over 7.5 (4 bits), 127.5 (8 bits) or 1 (nf4)."""
    import qwix

    qtype = {4: jnp.int4, 8: jnp.int8, NORMAL_FLOAT: NORMAL_FLOAT}[levels]
    others = [n for n in range(weight.ndim) if n != axis]
    return qwix.quantize(weight, qtype, channelwise_axes=others, tiled_axes={axis: inputs})


def pack(values: Int[np.ndarray, "*lead D"]) -> UInt8[np.ndarray, "*lead half_D"]:
    """Return integers from -8 to 7, or from 0 to 15, in half a byte each, on the host: those of the
    first half of the last axis in the low bits, of the second half in the high bits.

    Unpacking concatenates two halves, which XLA:CPU computes several times faster than interleaved
    values, or than arrays of int4.
    """
    low, high = np.split(values.astype(np.int8).view(np.uint8) & 15, 2, axis=-1)
    return low | high << 4


def unpack(packed: UInt8[Array, "*lead half_D"]) -> Int8[Array, "*lead D"]:
    """Return the inverse of `pack` for integers from -8 to 7."""
    return (_unpack_levels(packed).astype(jnp.int8) ^ 8) - 8  # extends the sign


def _unpack_levels(packed: UInt8[Array, "*lead half_D"]) -> UInt8[Array, "*lead D"]:
    """Return the inverse of `pack` for integers from 0 to 15."""
    return jnp.concatenate([packed & 15, packed >> 4], axis=-1)
