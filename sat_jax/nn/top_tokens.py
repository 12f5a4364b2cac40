"""The most likely tokens of a teacher at each position, and all other tokens as one outcome."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from sat_jax.nn.loss import split_positions

_LOWEST = -30.0  # log-probability of the other tokens, also where there are none
_NOT_COUNTED = -1e9  # in place of log-probabilities: -inf would have no gradient


class TopTokens(NamedTuple):
    """The ids of k tokens, and the log-probabilities of these and, last, of all others together, at
    the temperature of the settings; JAX arrays, numpy arrays or their shapes."""

    ids: Int[Any, "*positions k"]
    log_p: Float[Any, "*positions k+1"]


def grouped(log_p: Float[Array, "*N V"], ids: Int[Array, "*N k"]) -> Float[Array, "*N k+1"]:
    """Return the log-probabilities of `ids` and of all other tokens together, at least -30."""
    chosen = jnp.take_along_axis(log_p, ids, axis=-1)
    mask = jnp.put_along_axis(jnp.zeros(log_p.shape, jnp.bool_), ids, True, axis=-1, inplace=False)
    others = jax.nn.logsumexp(jnp.where(mask, _NOT_COUNTED, log_p), axis=-1, keepdims=True)
    return jnp.concatenate([chosen, jnp.maximum(others, _LOWEST)], axis=-1)


def top_tokens(
    hidden_BTE: Float[Array, "B T E"],
    head_VE: Float[Array, "V E"],
    k: int,
    temperature: float,
    chunk: int,
) -> TopTokens:
    """Return the k most likely tokens of softmax(logits / `temperature`), in descending order.

    Logits of `chunk` positions of each row are in memory at a time.
    """

    def of_chunk(_: None, h_BCE: Array) -> tuple[None, TopTokens]:
        logits = jnp.einsum("BCE,VE->BCV", h_BCE, head_VE, preferred_element_type=jnp.float32)
        log_p = jax.nn.log_softmax(logits / temperature)
        ids = jax.lax.top_k(log_p, k)[1]
        return None, TopTokens(ids, grouped(log_p, ids))

    _, chunks = jax.lax.scan(of_chunk, None, split_positions(chunk, hidden_BTE)[0])
    batch, length = hidden_BTE.shape[:2]

    def joined(x: Array) -> Array:
        return jnp.moveaxis(x, 0, 1).reshape(batch, -1, x.shape[-1])[:, :length]

    return jax.tree.map(joined, chunks)
