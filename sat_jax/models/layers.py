"""The small parts that every block shares."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

# The axes of a mesh that rows and KV groups are split over, for what the compiler cannot split.
ROW_AXES, GROUP_AXES = ("data", "fsdp"), ("tensor",)


class Mask(nnx.Variable):
    """Indices of kept neurons, int32, sorted and unique; never trained, never a `Param`."""


class Whole(nnx.Variable):
    """Whole matrices of which a module's parameters are kept rows; never trained themselves."""


def rms_norm(
    x: Float[Array, "*lead D"], scale: Float[Array, " D"], eps: float
) -> Float[Array, "*lead D"]:
    """x / rms(x) · scale over the last axis, in float32, returned in the dtype of `x`."""
    wide = x.astype(jnp.float32)
    normed = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    return (normed * jnp.expand_dims(scale, range(x.ndim - 1))).astype(x.dtype)


def normal(rngs: nnx.Rngs, shape: tuple[int, ...], scale: float) -> Array:
    """Float32 values from N(0, scale²)."""
    return scale * jax.random.normal(rngs.params(), shape, jnp.float32)


def indicator(kept: Int[Array, "*lead K"], size: int, dtype: jnp.dtype) -> Float[Array, "*lead N"]:
    """0/1 over `size` neurons: 1 where the index is among `kept`."""
    nothing = jnp.zeros((*kept.shape[:-1], size), dtype)
    return jnp.put_along_axis(nothing, kept, 1, axis=-1, inplace=False)
