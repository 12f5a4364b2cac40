"""Weights whose gradient is estimated from a sample of the tokens.

The gradient of a weight is a sum over tokens of outer products. Tokens are sampled with
probabilities in proportion to the norms of these products, and each product is divided by its
probability, so that the estimate is unbiased; tokens with the largest norms have probability 1
(after WTA-CRS, Liu et al., arXiv:2305.15265, which samples with replacement). The forward pass and
the gradient of the input use all tokens.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int, UInt32

from sat_jax.nn.linear import PRODUCT, Weight, combine, project, weight_gradient


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=("array", "key"), meta_fields=("rate",)
)
@dataclasses.dataclass(frozen=True)
class SampledTokens(Weight):
    """An array whose gradient leaves out the share `rate` of the tokens of each row. `key` is the
    data of a random key, of each layer."""

    array: Float[Array, "*shape"]
    key: UInt32[Array, "*L words"]
    rate: float

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the array."""
        return self.array.shape

    def dense(self) -> Array:
        """Return the array."""
        return self.array

    def project(self, x: Float[Array, "B T D"]) -> Array:
        """Return `x · Wᵀ`, `[B, T, *units]`."""
        return checkpoint_name(_sampled_project(self, x), PRODUCT)

    def combine(self, a: Array) -> Float[Array, "B T D"]:
        """Return `a · W` for activations `[B, T, *units]`."""
        return _sampled_combine(self, a)

    def gradient(self, x: Array, dy: Array) -> "SampledTokens":
        """Return the estimate of `weight_gradient(x, dy)`, as a cotangent of the weight."""
        no_gradient: Any = None
        norms = _norms(x) * _norms(dy)
        count = sampled_tokens(self.rate, norms.shape[1])
        key = jax.random.wrap_key_data(self.key)
        places, factors = sample(key, norms, count)
        sampled_x, sampled_dy = (_take(array, places) for array in (x, dy))
        factors = factors.reshape(*factors.shape, *(1,) * (dy.ndim - 2)).astype(dy.dtype)
        estimate = weight_gradient(sampled_x, sampled_dy * factors)
        return dataclasses.replace(self, array=estimate, key=no_gradient)


def sampled_tokens(rate: float, length: int) -> int:
    """Return how many tokens of a row of `length` are sampled where the share `rate` is not."""
    return max(1, round((1 - rate) * length))


def sample(
    key: Array, norms: Float[Array, "B T"], count: int
) -> tuple[Int[Array, "B count"], Float[Array, "B count"]]:
    """Return the places of sampled tokens, and 1 / probability of each; 0 where a row has fewer
    tokens with a norm above 0 (systematic sampling)."""
    probabilities = inclusion_probabilities(norms, count)
    ends = jnp.cumsum(probabilities, axis=1)
    start = jax.random.uniform(key, (len(norms), 1))
    points = start + jnp.arange(count, dtype=jnp.float32)[None]
    search = jax.vmap(functools.partial(jnp.searchsorted, side="right"))
    places = jnp.minimum(search(ends, points), norms.shape[1] - 1)
    chosen = jnp.take_along_axis(probabilities, places, axis=1)
    exists = (points < ends[:, -1:]) & (chosen > 0)
    return places, jnp.where(exists, 1 / jnp.where(exists, chosen, 1.0), 0.0)


def inclusion_probabilities(norms: Float[Array, "B T"], count: int) -> Float[Array, "B T"]:
    """Return min(1, c · norm) with c of each row such that the sum is `count`, or all tokens with a
    norm above 0 are certain."""
    descending = -jnp.sort(-norms, axis=1)
    rest = jnp.cumsum(descending[:, ::-1], axis=1)[:, ::-1]
    left = count - jnp.arange(norms.shape[1], dtype=jnp.float32)[None]
    certain = jnp.cumprod((left > 0) & (left * descending >= rest) & (rest > 0), axis=1)
    number = jnp.sum(certain, axis=1, keepdims=True)
    place = jnp.minimum(number, norms.shape[1] - 1)
    remaining = jnp.take_along_axis(rest, place, axis=1)
    uncertain = (count - number) / jnp.where(remaining > 0, remaining, 1.0)
    is_certain = norms >= jnp.take_along_axis(descending, jnp.maximum(number - 1, 0), axis=1)
    return jnp.where((number > 0) & is_certain, 1.0, jnp.minimum(1.0, uncertain * norms))


def _norms(x: Array) -> Float[Array, "B T"]:
    flat = x.reshape(*x.shape[:2], -1).astype(jnp.float32)
    return jnp.sqrt(jnp.sum(flat * flat, axis=-1))


def _take(x: Array, places: Int[Array, "B count"]) -> Array:
    return jnp.take_along_axis(x, places.reshape(*places.shape, *(1,) * (x.ndim - 2)), axis=1)


@jax.custom_vjp
def _sampled_project(w: SampledTokens, x: Array) -> Array:
    return project(w.array, x)


def _project_forward(w: SampledTokens, x: Array) -> tuple[Array, tuple[SampledTokens, Array]]:
    return project(w.array, x), (w, x)


def _project_backward(saved: tuple[SampledTokens, Array], dy: Array) -> tuple[SampledTokens, Array]:
    w, x = saved
    return w.gradient(x, dy), combine(w.array, dy)


_sampled_project.defvjp(_project_forward, _project_backward)


@jax.custom_vjp
def _sampled_combine(w: SampledTokens, a: Array) -> Array:
    return combine(w.array, a)


def _combine_forward(w: SampledTokens, a: Array) -> tuple[Array, tuple[SampledTokens, Array]]:
    return combine(w.array, a), (w, a)


def _combine_backward(saved: tuple[SampledTokens, Array], dy: Array) -> tuple[SampledTokens, Array]:
    w, a = saved
    return w.gradient(dy, a), project(w.array, dy)


_sampled_combine.defvjp(_combine_forward, _combine_backward)
