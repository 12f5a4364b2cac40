"""Parts that the Pallas kernels for TPU share."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

VMEM_BYTES = 64 * 2**20


def dot(a: Array, b: Array, a_axis: int, b_axis: int) -> Array:
    """Return the product contracted over one axis of each; float32 uses the highest precision."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    axes = (((a_axis,), (b_axis,)), ((), ()))
    return jax.lax.dot_general(a, b, axes, precision, jnp.float32)


def compiled_on_tpu(call: Callable[..., Any]) -> Callable[..., Any]:
    """Return `call(*arrays, interpret=...)`, compiled on a TPU and interpreted elsewhere."""
    compiled, interpreted = (functools.partial(call, interpret=i) for i in (False, True))
    return lambda *arrays: jax.lax.platform_dependent(*arrays, tpu=compiled, default=interpreted)
