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
from jaxtyping import Array, Float, Int, UInt32

from sat_jax.nn.linear import weight_gradient
from sat_jax.nn.own_gradient import OwnGradient


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=("array", "key"), meta_fields=("rate",)
)
@dataclasses.dataclass(frozen=True)
class SampledTokens(OwnGradient):
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

    def gradient(self, x: Array, a: Array) -> "SampledTokens":
        """Return the estimate of `weight_gradient(x, a)`, as a cotangent of the weight."""
        no_gradient: Any = None
        norms = _norms(x) * _norms(a)
        count = sampled_tokens(self.rate, norms.shape[1])
        key = jax.random.wrap_key_data(self.key)
        places, factors = sample(key, norms, count)
        sampled_x, sampled_a = (_take(array, places) for array in (x, a))
        factors = factors.reshape(*factors.shape, *(1,) * (a.ndim - 2)).astype(a.dtype)
        estimate = weight_gradient(sampled_x, sampled_a * factors)
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
