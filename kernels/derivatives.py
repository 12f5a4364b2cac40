"""Refusal of derivatives that do not exist."""

import functools
from typing import Any

import jax
from jaxtyping import Array


def refuse_derivatives(values: Any, reason: str) -> Any:
    """Return the arrays `values`; their differentiation raises a `TypeError` with `reason`."""
    return jax.tree.map(lambda x: _not_differentiable(reason, x), values)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _not_differentiable(reason: str, x: Array) -> Array:
    del reason
    return x


@_not_differentiable.defjvp
def _refuse(reason: str, _primals: Any, _tangents: Any) -> Any:
    raise TypeError(reason)
