"""Scores → the neurons that are kept."""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

Selection = Literal["topk", "sample"]


def select(
    scores: Float[Array, "*lead N"],
    keep: int,
    *,
    selection: Selection = "topk",
    key: PRNGKeyArray | None = None,
    balance: int = 1,
    block: int = 1,
    temperature: float = 1.0,
) -> Int[Array, "*lead keep"]:
    """Indices of the `keep` neurons chosen along the last axis: int32, sorted, unique.

    `keep / balance` are chosen in each of `balance` contiguous parts, in aligned runs of `block`
    whose scores are added. `topk` takes the highest scores, the lower index at a tie; `sample`
    draws without replacement with probability in proportion to score^(1 / temperature) (Gumbel
    top-k, needs `key`). A run with a NaN score counts as the lowest. N and `keep` are multiples of
    `balance · block`.
    """
    total = scores.shape[-1]
    unit = balance * block
    if total % unit or keep % unit or not 0 <= keep <= total:
        raise ValueError(f"cannot keep {keep} of {total} neurons in multiples of {unit}")
    lead = scores.shape[:-1]
    runs = scores.reshape(*lead, balance, total // unit, block).sum(-1)
    runs = jnp.where(jnp.isnan(runs), -jnp.inf, runs)
    if selection == "sample":
        if key is None:
            raise ValueError("selection 'sample' needs a key")
        drawn = jax.random.gumbel(key, runs.shape)
        runs = jnp.log(jnp.maximum(runs, 0)) / temperature + drawn
    _, chosen = jax.lax.top_k(runs, keep // unit)
    chosen = jnp.sort(chosen, axis=-1)
    chosen = chosen + jnp.expand_dims(
        jnp.arange(balance)[:, None] * (total // unit), range(len(lead))
    )
    indices = chosen[..., None] * block + jnp.arange(block).reshape((1,) * chosen.ndim + (block,))
    return indices.reshape(*lead, keep).astype(jnp.int32)
