"""Weights of which some rows are trained and the others are constant.

The forward pass and the gradient of the input use all rows. The gradient of the weight, a third of
the work of a product in training, is computed for the trained rows alone.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sat_jax.nn.linear import weight_gradient
from sat_jax.nn.own_gradient import OwnGradient


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("trained", "frozen"),
    meta_fields=("axis", "parts"),
)
@dataclasses.dataclass(frozen=True)
class PartlyTrained(OwnGradient):
    """A weight whose rows are `trained` and `frozen` ones, joined by `join_rows`.

    Both are `[*L, *units, D]`, and differ in the size of `axis`, which counts from the end.
    """

    trained: Float[Array, "*trained D"]
    frozen: Float[Array, "*frozen D"]
    axis: int
    parts: int = 1

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the joined array, of one layer or of all."""
        shape = list(self.trained.shape)
        shape[self.axis] += self.frozen.shape[self.axis]
        return tuple(shape)

    def dense(self) -> Array:
        """Return all rows."""
        return join_rows(self.trained, self.frozen, self.axis, self.parts)

    def of_trained(self, a: Array) -> Array:
        """Return the entries of the trained rows in activations `[B, T, *units]`."""
        axis = (self.axis + 1) % a.ndim
        return split_rows(a, self.trained.shape[self.axis], axis, self.parts)[0]

    def gradient(self, x: Array, a: Array) -> "PartlyTrained":
        """Return the cotangent of the weight: `weight_gradient(x, a)` of its trained rows."""
        no_gradient: Any = None
        return dataclasses.replace(self, trained=weight_gradient(x, a), frozen=no_gradient)


def join_rows(trained: Array, frozen: Array, axis: int, parts: int = 1) -> Array:
    """Return the rows of both arrays along `axis`: in each of `parts` equal parts the trained rows
    first. Parts on different devices stay there."""
    axis %= trained.ndim
    rows = [_in_parts(array, axis, parts) for array in (trained, frozen)]
    joined = jnp.concatenate(rows, axis=axis + 1)
    return joined.reshape(*trained.shape[:axis], -1, *trained.shape[axis + 1 :])


def split_rows(array: Array, number: int, axis: int, parts: int = 1) -> tuple[Array, Array]:
    """Return the first `number` rows and the other ones, as `join_rows` joined them."""
    first, others = jnp.split(_in_parts(array, axis, parts), [number // parts], axis=axis + 1)
    shape = (*array.shape[:axis], -1, *array.shape[axis + 1 :])
    return first.reshape(shape), others.reshape(shape)


def _in_parts(array: Array, axis: int, parts: int) -> Array:
    return array.reshape(*array.shape[:axis], parts, -1, *array.shape[axis + 1 :])
