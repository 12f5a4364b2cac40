"""Weights in 4 or 8 bits, which are dequantized one matrix at a time when they are used."""

import dataclasses
import functools
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
import qwix
from jaxtyping import Array, Float, Int, Int8, UInt8

from sat_jax.nn.linear import Axes, Weight, combine, project

Bits = Literal[4, 8]


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("values", "scale", "input_scale"),
    meta_fields=("writes",),
)
@dataclasses.dataclass(frozen=True)
class Quantized(Weight):
    """A frozen weight `[*L, *units, D]`: integers times the scale of their group.

    A group is `in / groups` consecutive inputs of one output. Inputs are the last axis; those of a
    weight that `writes` to the residual stream are all units, flattened, and `scale` is
    `[*L, groups, D]`. Integers of 8 bits are int8 `values`. Those of 4 bits are uint8, two in each
    (`pack`), so that all devices store them in half a byte. With an `input_scale` (AWQ), `[*L, D]`
    or, where the weight `writes`, `[*L, *units]`, the weights of each input are multiplied by it.
    """

    values: Int8[Array, "*axes"] | UInt8[Array, "*half_axes"]
    scale: Float[Array, "*axes groups"] | Float[Array, "*L groups D"]
    input_scale: Float[Array, "*inputs"] | None = None
    writes: bool = False
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
        values = unpack(self.values) if self.bits == 4 else self.values
        # The units of a weight that writes become one axis, that of `scale`.
        rows = values.reshape(*self.scale.shape[:-2], -1, self.shape[-1])
        dense = qwix.dequantize(qwix.QArray(rows, self.scale)).reshape(self.shape)
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
        arrays: dict[str, tuple[Axes, bool]] = {"values": (axes, False), "scale": (scale, False)}
        if self.input_scale is not None:
            arrays["input_scale"] = (axes[:-1] if self.writes else (layer, width), False)
        return arrays

    def project(self, x: Float[Array, "B T D"]) -> Array:
        """Return `x · Wᵀ`, `[B, T, *units]`, in the dtype of `x`."""
        return project(self.dense().astype(x.dtype), x)

    def combine(self, a: Array) -> Float[Array, "B T D"]:
        """Return `a · W` for activations `[B, T, *units]`, in their dtype."""
        return combine(self.dense().astype(a.dtype), a)


def pack(values: Int[np.ndarray, "*lead D"]) -> UInt8[np.ndarray, "*lead half_D"]:
    """Return integers from -8 to 7 in half a byte each, on the host: those of the first half of the
    last axis in the low bits, of the second half in the high bits.

    Unpacking concatenates two halves, which XLA:CPU computes several times faster than interleaved
    values, or than arrays of int4.
    """
    low, high = np.split(values.astype(np.int8).view(np.uint8) & 15, 2, axis=-1)
    return low | high << 4


def unpack(packed: UInt8[Array, "*lead half_D"]) -> Int8[Array, "*lead D"]:
    """Return the inverse of `pack`."""
    halves = jnp.concatenate([packed & 15, packed >> 4], axis=-1)
    return (halves.astype(jnp.int8) ^ 8) - 8  # extends the sign
