"""Tokens that skip layers: each layer processes a random subset of the tokens of a row (random-LTD,
Yao et al., arXiv:2211.11586)."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, PRNGKeyArray

from sat_jax.nn.context import LayerTokens
from sat_jax.sparsity.plan import Plan

_SKIPS = 4  # the purpose of a random key: what it is folded with after the seed


def draw_tokens(
    plan: Plan, seed: int, step: Int[Array, ""], segment_ids: Int[Array, "B T"]
) -> LayerTokens:
    """Return the tokens that the layers of each segment process in a step."""
    if plan.token_skip_rate == 0:
        return ()
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), _SKIPS), step)
    length = segment_ids.shape[1]
    return tuple(
        random_tokens(
            jax.random.fold_in(key, segment.start),
            segment.layers,
            segment.tokens(length),
            segment_ids,
        )
        if segment.token_skip_rate > 0
        else None
        for segment in plan.segments
    )


def random_tokens(
    key: PRNGKeyArray, layers: int, count: int, segment_ids: Int[Array, "B T"]
) -> Int[Array, "L B count"]:
    """Return for each layer random places of tokens in each row, in ascending order. A row of too
    few tokens has places of padding too."""
    is_padding = (segment_ids == 0).astype(jnp.float32)
    draws = jax.random.uniform(key, (layers, *segment_ids.shape)) - is_padding[None]
    # Not top_k, for which a mesh gathers the rows of all devices.
    order = jnp.argsort(draws, axis=-1, descending=True)
    return jnp.sort(order[..., :count], axis=-1)
