"""The small parts that every block shares."""

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from sat_jax.sparsity.neurons import add_at_kept, others

# The axes of a mesh that rows and KV groups are split over, for what the compiler cannot split.
ROW_AXES, GROUP_AXES = ("data", "fsdp"), ("tensor",)


class Mask(nnx.Variable):
    """Indices of kept neurons, int32, sorted and unique; never trained, never a `Param`."""


class Offset(nnx.Variable):
    """What the kept rows of an output matrix get for those that are omitted; never trained."""


class Whole(nnx.Variable):
    """A whole matrix of which a module's parameter is the kept rows; never trained itself."""


class WholeMatrices(nnx.Module):
    """By the names of a module's parameters the whole matrices of which these are the rows `kept`:
    what is computed with, where it lies. The parameters have no more than the gradient."""

    def __init__(self, kept: Array, matrices: Mapping[str, Array]):
        self.kept = Mask(kept)
        for name, matrix in matrices.items():
            setattr(self, name, Whole(matrix))

    def matrix(self, name: str) -> Array:
        """The matrix of the parameter of that name."""
        matrix: Array = getattr(self, name)[...]
        return matrix

    def others(self, neurons: int) -> "WholeMatrices":
        """Of one layer, the same matrices with those rows kept, of `neurons`, that are not here."""
        rest: WholeMatrices = nnx.merge(*nnx.split(self))
        rest.kept = Mask(others(self.kept[...], neurons))
        return rest


@jax.custom_vjp
def rows_in_place(whole: Array, rows: Array, kept: Int[Array, "*K kept"]) -> Array:
    """The kept rows of a matrix; or, if `kept` has axes in front, those of each of its parts. The
    gradient is that of `rows`, whose values are not used."""
    del rows
    take = functools.partial(
        jnp.take, axis=0, unique_indices=True, indices_are_sorted=True, mode="clip"
    )
    return take(whole, kept) if kept.ndim == 1 else jax.vmap(take)(whole, kept)


def _rows_forward(whole: Array, rows: Array, kept: Array) -> tuple[Array, None]:
    return rows_in_place(whole, rows, kept), None


def _rows_backward(_: None, gradient: Array) -> tuple[None, Array, None]:
    return None, gradient, None


rows_in_place.defvjp(_rows_forward, _rows_backward)


def with_offset(rows: Array, offset: Offset | None, kept: Mask | None) -> Array:
    """An output matrix of one layer with what its kept rows get: all rows, or those at `kept`."""
    if offset is None:
        return rows
    return rows + offset[...] if kept is None else add_at_kept(rows, offset[...], kept[...])


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
