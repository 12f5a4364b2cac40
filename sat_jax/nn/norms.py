"""Normalisation over the width of the residual stream, computed in float32."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sat_jax.nn.inner import inner
from sat_jax.nn.linear import dense


def rms_norm(x: Float[Array, "*lead D"], scale: Any, eps: float) -> Float[Array, "*lead D"]:
    """Return x / rms(x) · scale over the last axis, in the dtype of `x`."""
    return _rms_norm(x, dense(scale), eps)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _rms_norm(x: Array, scale: Array, eps: float) -> Array:
    """`rms_norm` whose backward pass computes the normalised values again, from `x` and one number
    per token: storing them for each layer takes longer."""
    return _rms_norm_forward(x, scale, eps)[0]


def _rms_norm_forward(
    x: Array, scale: Array, eps: float
) -> tuple[Array, tuple[Array, Array, Array]]:
    wide = x.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    y = wide * inverse * jnp.expand_dims(scale, range(x.ndim - 1))
    return y.astype(x.dtype), (x, scale, inverse)


def _rms_norm_backward(
    eps: float, saved: tuple[Array, Array, Array], dy: Array
) -> tuple[Array, Array]:
    del eps
    x, scale, inverse = saved
    normed, dy = x.astype(jnp.float32) * inverse, dy.astype(jnp.float32)
    d_normed = dy * jnp.expand_dims(scale, range(x.ndim - 1))
    mean = inner(d_normed, normed)[..., None] / x.shape[-1]
    dx = inverse * (d_normed - normed * mean)
    d_scale = jnp.sum(dy * normed, axis=tuple(range(x.ndim - 1)))
    return dx.astype(x.dtype), d_scale.astype(scale.dtype)


_rms_norm.defvjp(_rms_norm_forward, _rms_norm_backward)


def layer_norm(
    x: Float[Array, "*lead D"], scale: Any, bias: Any, eps: float
) -> Float[Array, "*lead D"]:
    """Return (x - mean(x)) / std(x) · scale + bias over the last axis, in the dtype of `x`."""
    wide = x.astype(jnp.float32)
    wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
    normed = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    scaled = normed * jnp.expand_dims(dense(scale), range(x.ndim - 1))
    return (scaled + jnp.expand_dims(dense(bias), range(x.ndim - 1))).astype(x.dtype)
