"""Decoding with a cache: keys and values are kept, so that each new token is one column of work."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from sat_jax.models.attention import Rows
from sat_jax.models.dot_product import attend_chunk
from sat_jax.models.layers import Mask, rms_norm
from sat_jax.models.llama import Block, Llama, cast
from sat_jax.models.llama_config import LlamaConfig
from sat_jax.models.rope import rotary_tables


class Cache(NamedTuple):
    """What every layer keeps of the tokens so far, in slots 0, 1, …, `used` - 1 of S.

    `segment_ids`: 1 for a row's tokens, 0 for padding. A slot is seen by the slots behind it that
    have the same number, so padding may stand anywhere and is never attended to by a token.
    """

    keys: Float[Array, "L B S K E"]
    values: Float[Array, "L B S K E"]
    segment_ids: Int[Array, "B S"]
    used: Int[Array, ""]


def empty_cache(config: LlamaConfig, batch: int, slots: int, dtype: str) -> Cache:
    """A cache with no slot used."""
    shape = (config.n_layers, batch, slots, config.n_kv_heads, config.head_dim)
    return Cache(
        keys=jnp.zeros(shape, dtype),
        values=jnp.zeros(shape, dtype),
        segment_ids=jnp.zeros((batch, slots), jnp.int32),
        used=jnp.zeros((), jnp.int32),
    )


def for_decoding(model: Llama) -> Llama:
    """The model with its weights in the compute dtype once, instead of at every token.

    Raises `ValueError` for a model with omitted neurons.
    """
    if len(model.layers) > 1 or jax.tree.leaves(nnx.state(model, Mask)):
        raise ValueError("a model with omitted neurons cannot decode; expand it first")
    graph, params = nnx.split(model)
    decoding: Llama = nnx.merge(graph, cast(params, model.compute.dtype))
    return decoding


def extend(
    model: Llama,
    cache: Cache,
    tokens: Int[Array, "B T"],
    segment_ids: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    length: int,
) -> tuple[Float[Array, "B T D"], Cache]:
    """The normed residual stream of T more tokens, and the cache with them in its next T slots.

    `model` comes from `for_decoding`. `length`: the whole planned length in tokens, which `dynamic`
    RoPE takes its angles from; the keys of one cache must agree on it.
    """
    config = model.config
    rows = Rows(segment_ids, *rotary_tables(config.rope, config.head_dim, positions, length))
    seen = jax.lax.dynamic_update_slice(cache.segment_ids, segment_ids, (0, cache.used))
    x_BTD = jnp.take(model.embed[...], tokens, axis=0)
    graph, stacked = nnx.split(model.layers[0])

    def layer(
        carry: tuple[Array, Array, Array], indexed: tuple[nnx.State, Array]
    ) -> tuple[Any, None]:
        # The cache is carried and not scanned over: so only the new slots are written.
        x_BTD, keys, values = carry
        one, index = indexed
        block: Block = nnx.merge(graph, one)
        normed = rms_norm(x_BTD, block.attention_norm[...], block.norm_eps)
        q_BTKGE, k_BTKE, v_BTKE = block.attention.project(normed, rows)
        start = (index, 0, cache.used, 0, 0)
        keys = jax.lax.dynamic_update_slice(keys, k_BTKE[None], start)
        values = jax.lax.dynamic_update_slice(values, v_BTKE[None], start)
        o_BTKGE = attend_chunk(cache.used, q_BTKGE, keys[index], values[index], segment_ids, seen)
        x_BTD += block.attention.combine(o_BTKGE)
        normed = rms_norm(x_BTD, block.mlp_norm[...], block.norm_eps)
        x_BTD += block.mlp(normed)
        return (x_BTD, keys, values), None

    layers = jnp.arange(config.n_layers)
    carry = (x_BTD, cache.keys, cache.values)
    (x_BTD, keys, values), _ = jax.lax.scan(layer, carry, (stacked, layers))
    x_BTD = rms_norm(x_BTD, model.final_norm[...], config.norm_eps)
    return x_BTD, Cache(keys, values, seen, cache.used + tokens.shape[1])
