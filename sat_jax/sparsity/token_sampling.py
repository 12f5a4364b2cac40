"""Sampled tokens in the weight gradients of all branches of a model."""

from typing import Any

import jax
from flax import nnx
from jaxtyping import Array, Int, PRNGKeyArray

from sat_jax.nn.branch import branches
from sat_jax.nn.sampled_tokens import SampledTokens

_TOKENS = 3  # the purpose of a random key: what it is folded with after the seed


def token_key(seed: int, step: Int[Array, ""]) -> PRNGKeyArray:
    """Return the key of the samples of one step."""
    key = jax.random.fold_in(jax.random.key(seed), _TOKENS)
    return jax.random.fold_in(key, step)


def sample_tokens(block: Any, rate: float, key: PRNGKeyArray) -> None:
    """Replace the matrices of a block's branches by those whose gradients leave out the share
    `rate` of the tokens. All matrices, layers and segments have random keys of their own."""
    for branch in branches(block).values():
        for variable in vars(branch).values():
            if isinstance(variable, nnx.Param) and variable.role in ("read", "write"):
                key, own = jax.random.split(key)
                variable.set_value(_sampled(variable.get_value(), rate, own))


def _sampled(value: Any, rate: float, key: PRNGKeyArray) -> Any:
    if isinstance(value, tuple):
        keys = jax.random.split(key, len(value))
        return tuple(_sampled(part, rate, own) for part, own in zip(value, keys, strict=True))
    assert isinstance(value, jax.Array), f"tokens cannot be sampled for a {type(value).__name__}"
    keys = jax.random.split(key, len(value))
    return SampledTokens(value, jax.random.key_data(keys), rate)
