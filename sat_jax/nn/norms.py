"""Normalisation over the width of the residual stream, computed in float32."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sat_jax.nn.linear import dense


def rms_norm(x: Float[Array, "*lead D"], scale: Any, eps: float) -> Float[Array, "*lead D"]:
    """Return x / rms(x) · scale over the last axis, in the dtype of `x`."""
    wide = x.astype(jnp.float32)
    normed = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    return (normed * jnp.expand_dims(dense(scale), range(x.ndim - 1))).astype(x.dtype)


def layer_norm(
    x: Float[Array, "*lead D"], scale: Any, bias: Any, eps: float
) -> Float[Array, "*lead D"]:
    """Return (x - mean(x)) / std(x) · scale + bias over the last axis, in the dtype of `x`."""
    wide = x.astype(jnp.float32)
    wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
    normed = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    scaled = normed * jnp.expand_dims(dense(scale), range(x.ndim - 1))
    return (scaled + jnp.expand_dims(dense(bias), range(x.ndim - 1))).astype(x.dtype)
