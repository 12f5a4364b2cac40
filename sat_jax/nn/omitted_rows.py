"""Frozen weights of which some rows are omitted: a product has zeros in their place.

Rows belong to units (heads, channels). Some tokens may be computed with all rows (`DenseTokens`).
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from sat_jax.nn.linear import Weight, combine, project
from sat_jax.nn.partly_trained import join_rows, split_rows
from sat_jax.nn.token_places import put_tokens, take_tokens


class DenseTokens(NamedTuple):
    """The tokens of each row that are computed with all rows of a weight: `mask` is True there, and
    `places` are those of all of them, ascending, with places of other tokens where a row has
    fewer."""

    mask: Bool[Array, "B T"]
    places: Int[Array, "B C"]


def dense_tokens(mask: Bool[Array, "B T"], count: int) -> DenseTokens:
    """Return the tokens where the mask is True, of which no row may have more than `count`."""
    places = jnp.argsort(~mask, axis=1, stable=True)[:, :count]
    return DenseTokens(mask, jnp.sort(places, axis=1).astype(jnp.int32))


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("kept", "omitted", "tokens"),
    meta_fields=("axis", "parts"),
)
@dataclasses.dataclass(frozen=True)
class OmittedRows(Weight):
    """A weight whose rows are `kept` and `omitted` ones, joined by `join_rows`.

    Both are `[*units, D]`, and differ in the size of `axis`, which counts from the end. Products
    with `omitted` are computed for `tokens` alone, and are 0 for the others; None: for no token.
    """

    kept: Float[Array, "*kept D"]
    omitted: Float[Array, "*omitted D"]
    tokens: DenseTokens | None
    axis: int
    parts: int = 1

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the joined array."""
        shape = list(self.kept.shape)
        shape[self.axis] += self.omitted.shape[self.axis]
        return tuple(shape)

    def dense(self) -> Array:
        """Return the rows of the weight of tokens that are not in `tokens`: omitted ones are 0."""
        return join_rows(self.kept, jnp.zeros_like(self.omitted), self.axis, self.parts)

    def project(self, x: Float[Array, "B T D"]) -> Array:
        """Return `x · Wᵀ`, `[B, T, *units]`."""
        y = project(self.kept, x)
        if self.tokens is None:
            others = jnp.zeros((*x.shape[:2], *self.omitted.shape[:-1]), y.dtype)
        else:
            others = self._at_places(project(self.omitted, self._taken(x)))
        return join_rows(y, others, self._axis_of(y), self.parts)

    def combine(self, a: Array) -> Float[Array, "B T D"]:
        """Return `a · W` for activations `[B, T, *units]`."""
        number = self.kept.shape[self.axis]
        kept, others = split_rows(a, number, self._axis_of(a), self.parts)
        y = combine(self.kept, kept)
        if self.tokens is None:
            return y
        return y + self._at_places(combine(self.omitted, self._taken(others)))

    def _axis_of(self, a: Array) -> int:
        return (self.axis + 1) % a.ndim

    def _taken(self, x: Float[Array, "B T ..."]) -> Float[Array, "B C ..."]:
        """Return the entries of `tokens`, and 0 in places that no token needs."""
        assert self.tokens is not None
        taken = take_tokens(x, self.tokens.places)
        needed = take_tokens(self.tokens.mask, self.tokens.places)
        return jnp.where(needed.reshape(*needed.shape, *(1,) * (x.ndim - 2)), taken, 0)

    def _at_places(self, y: Float[Array, "B C ..."]) -> Float[Array, "B T ..."]:
        """Return the entries of `tokens` in their places, and 0 in all others."""
        assert self.tokens is not None
        zeros = jnp.zeros((*self.tokens.mask.shape, *y.shape[2:]), y.dtype)
        return put_tokens(zeros, self.tokens.places, y)


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=("full", "mask", "tokens"), meta_fields=()
)
@dataclasses.dataclass(frozen=True)
class MaskedRows(Weight):
    """A weight whose products with all rows are multiplied by 0 where a row is omitted, but for the
    tokens that `tokens` marks: the reference for `OmittedRows`. `mask` has the leading axes of
    units, and is True where a row is kept."""

    full: Float[Array, "*units D"]
    mask: Bool[Array, "*kept"]
    tokens: Bool[Array, "B T"] | None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the array."""
        return self.full.shape

    def dense(self) -> Array:
        """Return the weight of tokens that are not in `tokens`: omitted rows are 0."""
        mask = jnp.expand_dims(self.mask, range(self.mask.ndim, self.full.ndim))
        return jnp.where(mask, self.full, 0)

    def project(self, x: Float[Array, "B T D"]) -> Array:
        """Return `x · Wᵀ`, `[B, T, *units]`."""
        return self._masked(project(self.full, x))

    def combine(self, a: Array) -> Float[Array, "B T D"]:
        """Return `a · W` for activations `[B, T, *units]`."""
        return combine(self.full, self._masked(a))

    def _masked(self, a: Array) -> Array:
        keep = self.mask[None, None]
        if self.tokens is not None:
            keep = keep | self.tokens.reshape(*self.tokens.shape, *(1,) * self.mask.ndim)
        return a * jnp.expand_dims(keep, range(keep.ndim, a.ndim)).astype(a.dtype)
