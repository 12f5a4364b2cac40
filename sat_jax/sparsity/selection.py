"""Selection of neurons by their scores."""

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
) -> Int[Array, "*lead keep"]:
    """Return the indices of the `keep` selected neurons on the last axis: int32, sorted, unique.

    Each of `balance` contiguous parts keeps `keep / balance`, in aligned blocks of `block` neurons
    whose scores are summed. `topk` selects the highest scores, and the lower index at a tie;
    `sample` draws without replacement in proportion to the scores (Gumbel top-k, needs `key`). A
    block with a NaN score ranks last. N and `keep` are multiples of `balance · block`.
    """
    total = scores.shape[-1]
    unit = balance * block
    if total % unit or keep % unit or not 0 <= keep <= total:
        raise ValueError(f"cannot keep {keep} of {total} neurons in multiples of {unit}")
    lead = scores.shape[:-1]
    sums = scores.reshape(*lead, balance, total // unit, block).sum(-1)
    sums = jnp.where(jnp.isnan(sums), -jnp.inf, sums)
    if selection == "sample":
        if key is None:
            raise ValueError("selection 'sample' needs a key")
        sums = jnp.log(jnp.maximum(sums, 0)) + jax.random.gumbel(key, sums.shape)
    _, chosen = jax.lax.top_k(sums, keep // unit)
    chosen = jnp.sort(chosen, axis=-1)
    chosen = chosen + jnp.expand_dims(
        jnp.arange(balance)[:, None] * (total // unit), range(len(lead))
    )
    indices = chosen[..., None] * block + jnp.arange(block).reshape((1,) * chosen.ndim + (block,))
    return indices.reshape(*lead, keep).astype(jnp.int32)
