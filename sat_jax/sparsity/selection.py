"""Selection of neurons by their scores."""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

Selection = Literal["topk", "sample"]


def select(
    scores: Float[Array, "*lead N"],
    keep: int,
    *,
    selection: Selection = "topk",
    key: PRNGKeyArray,
    balance: int = 1,
    block: int = 1,
) -> Int[Array, "*lead keep"]:
    """Return the indices of the `keep` selected neurons on the last axis: int32, sorted, unique.

    Each of `balance` contiguous parts keeps `keep / balance`, in aligned blocks of `block` neurons
    whose scores are summed. `topk` selects the highest scores, and the lower index at a tie; where
    all scores of a part are equal they are no ranking, and blocks are drawn uniformly with `key`.
    `sample` draws without replacement in proportion to the scores (Gumbel top-k). A block with a
    NaN score ranks last. N and `keep` are multiples of `balance · block`.
    """
    total = scores.shape[-1]
    unit = balance * block
    if total % unit or keep % unit or not 0 <= keep <= total:
        raise ValueError(f"cannot keep {keep} of {total} neurons in multiples of {unit}")
    lead = scores.shape[:-1]
    sums = scores.reshape(*lead, balance, total // unit, block).sum(-1)
    sums = jnp.where(jnp.isnan(sums), -jnp.inf, sums)
    noise = jax.random.gumbel(key, sums.shape)
    if selection == "sample":
        sums = jnp.log(jnp.maximum(sums, 0)) + noise
    sums = jnp.where(_all_equal(sums), noise, sums)
    _, chosen = jax.lax.top_k(sums, keep // unit)
    chosen = jnp.sort(chosen, axis=-1)
    chosen = chosen + jnp.expand_dims(
        jnp.arange(balance)[:, None] * (total // unit), range(len(lead))
    )
    indices = chosen[..., None] * block + jnp.arange(block).reshape((1,) * chosen.ndim + (block,))
    return indices.reshape(*lead, keep).astype(jnp.int32)


class Unranked(NamedTuple):
    """How many layers have scores that are no ranking: all equal, or not all finite."""

    equal: Int[Array, ""]
    not_finite: Int[Array, ""]


def count_unranked(scores: Float[Array, "L *within N"]) -> Unranked:
    """Return the counts of layers; a layer with an outer unit whose scores are all equal counts."""
    axes = tuple(range(1, scores.ndim))
    equal = jnp.any(_all_equal(scores), axis=axes)
    not_finite = ~jnp.all(jnp.isfinite(scores), axis=axes)
    return Unranked(*(jnp.sum(x, dtype=jnp.int32) for x in (equal, not_finite)))


def _all_equal(scores: Float[Array, "*lead N"]) -> Bool[Array, "*lead 1"]:
    return scores.max(axis=-1, keepdims=True) == scores.min(axis=-1, keepdims=True)
