"""Trained weights that are quantized in the forward pass (quantization-aware training)."""

import dataclasses
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sat_jax.nn.linear import Axes, weight_gradient
from sat_jax.nn.own_gradient import OwnGradient
from sat_jax.nn.quantized import Bits, round_to_nearest


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True)
class FakeQuantized(OwnGradient):
    """A float32 weight `[*L, *units, D]`, in whose place products use its values rounded to nearest
    in groups of inputs (Jacob et al., arXiv:1712.05877, section 3). The scales are those of the
    current weights, and the values are those of `Quantized` weights with the same groups.

    The gradient is that of the rounded weight, as if it were not rounded: the straight-through
    estimator (Bengio et al., arXiv:1308.3432). No weight is outside of the range of its group.

    `group`: the number of inputs that share a scale; 0: all. `unit_axes`: the number of axes of
    units, which are the inputs of a weight that `writes` to the residual stream.
    """

    array: Float[Array, "*axes"]
    bits: Bits
    group: int
    unit_axes: int
    writes: bool
    float32: ClassVar[tuple[str, ...]] = ("array",)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the array, of one layer or of all."""
        return self.array.shape

    def dense(self) -> Array:
        """Return the rounded weight in float32, of one layer or of all."""
        lead = self.shape[: self.array.ndim - 1 - self.unit_axes]
        rows = self.array.reshape(*lead, -1, self.shape[-1])
        axis = rows.ndim - (2 if self.writes else 1)
        rounded = round_to_nearest(rows, self.bits, axis, self.group or rows.shape[axis])
        import qwix

        return qwix.dequantize(rounded).reshape(self.shape)

    def describe(self, axes: Axes) -> dict[str, tuple[Axes, bool]]:
        """Return the axes of the array, which is trained. It has the path of the parameter."""
        return {"": (axes, True)}

    def gradient(self, x: Float[Array, "B T D"], a: Array) -> "FakeQuantized":
        """Return the cotangent of the weight."""
        return dataclasses.replace(self, array=weight_gradient(x, a).astype(jnp.float32))

    def tree_flatten_with_keys(self) -> Any:
        """Return the array, under the path of the parameter, and the settings."""
        array = (jax.tree_util.GetAttrKey(""), self.array)
        return (array,), (self.bits, self.group, self.unit_axes, self.writes)

    @classmethod
    def tree_unflatten(cls, settings: Any, children: Any) -> Self:
        """Return the weight with this array and these settings."""
        return cls(*children, *settings)
