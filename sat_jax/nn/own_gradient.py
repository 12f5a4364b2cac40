"""Weights that compute their own gradient.

The forward pass and the gradient of the input are those of the dense array.
"""

from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from sat_jax.nn.linear import PRODUCT, Weight, combine, project


class OwnGradient(Weight):
    """Base of weights whose gradient is not that of all units and all tokens."""

    def of_trained(self, a: Array) -> Array:
        """Return the entries of activations `[B, T, *units]` that the gradient needs. The others
        are not saved."""
        return a

    def gradient(self, x: Float[Array, "B T D"], a: Array) -> Any:
        """Return the cotangent of the weight: of `xᵀ · a` with `a` from `of_trained`, one of which
        is an activation and the other the cotangent of a product."""
        raise NotImplementedError

    def project(self, x: Float[Array, "B T D"]) -> Array:
        """Return `x · Wᵀ`, `[B, T, *units]`."""
        return checkpoint_name(_project(self, x), PRODUCT)

    def combine(self, a: Array) -> Float[Array, "B T D"]:
        """Return `a · W` for activations `[B, T, *units]`."""
        return _combine(self, a)


Saved = tuple[OwnGradient, Array]


@jax.custom_vjp
def _project(w: OwnGradient, x: Array) -> Array:
    return project(_dense(w, x), x)


def _project_forward(w: OwnGradient, x: Array) -> tuple[Array, Saved]:
    return project(_dense(w, x), x), (w, x)


def _project_backward(saved: Saved, dy: Array) -> tuple[Any, Array]:
    w, x = saved
    return w.gradient(x, w.of_trained(dy)), combine(_dense(w, dy), dy)


_project.defvjp(_project_forward, _project_backward)


@jax.custom_vjp
def _combine(w: OwnGradient, a: Array) -> Array:
    return combine(_dense(w, a), a)


def _combine_forward(w: OwnGradient, a: Array) -> tuple[Array, Saved]:
    return combine(_dense(w, a), a), (w, w.of_trained(a))


def _combine_backward(saved: Saved, dy: Array) -> tuple[Any, Array]:
    w, a = saved
    return w.gradient(dy, a), project(_dense(w, dy), dy)


_combine.defvjp(_combine_forward, _combine_backward)


def _dense(w: OwnGradient, x: Array) -> Array:
    """Return the dense array in the dtype of the activations: dequantized ones are float32."""
    return w.dense().astype(x.dtype)
