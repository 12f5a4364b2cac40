"""Grouped-query attention whose weights keep the head axes in front.

Query heads are group-major: query head `q` belongs to KV group `q // G`. Omitting a head or a whole
group is omitting rows. Multi-head attention is the case of one query head a group.
"""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from sat_jax.nn.attention.dot_product import attend_chunk, dot_product_attention
from sat_jax.nn.branch import Branch
from sat_jax.nn.context import Context
from sat_jax.nn.linear import project
from sat_jax.nn.norms import rms_norm
from sat_jax.nn.param import normal, param
from sat_jax.nn.rope import rotate


class Attention(Branch):
    """Attention of all layers, with K KV groups of G query heads of size E.

    `query` and `output` are `[L, K, G, E, D]`, `key` and `value` `[L, K, E, D]`. Optional: biases
    of query, key and value, and RMS norms of queries and keys. The bias of the output belongs to
    the block.
    """

    units = ("kv_group", "query_head")
    caches_tokens = True
    scored_by = ("query", "key", "value")

    def __init__(
        self,
        *,
        layers: int,
        kv_groups: int,
        query_heads: int,
        head_dim: int,
        embed: int,
        out_scale: float,
        bias: bool = False,
        norm: bool = False,
        norm_eps: float = 1e-5,
        rngs: nnx.Rngs,
    ):
        super().__init__()
        group = {"layer": layers, "kv_group": kv_groups}
        head = {**group, "query_head": query_heads}
        row = {"head_dim": head_dim, "embed": embed}
        self.query = param(normal(rngs, 0.02), {**head, **row})
        self.key = param(normal(rngs, 0.02), {**group, **row})
        self.value = param(normal(rngs, 0.02), {**group, **row})
        self.output = param(normal(rngs, out_scale), {**head, **row}, "write")
        self.query_bias = self.key_bias = self.value_bias = nnx.data(None)
        self.query_norm = self.key_norm = nnx.data(None)
        if bias:
            self.query_bias = param(jnp.zeros, {**head, "head_dim": head_dim}, "vector")
            self.key_bias = param(jnp.zeros, {**group, "head_dim": head_dim}, "vector")
            self.value_bias = param(jnp.zeros, {**group, "head_dim": head_dim}, "vector")
        if norm:
            self.query_norm = param(jnp.ones, {"layer": layers, "head_dim": head_dim}, "vector")
            self.key_norm = param(jnp.ones, {"layer": layers, "head_dim": head_dim}, "vector")
        self.norm_eps = norm_eps

    def activations(self, x: Float[Array, "B T D"], context: Context) -> Float[Array, "B T K G E"]:
        """Return the mix of values of every query head."""
        q_BTKGE = project(self.query, x, self.query_bias)
        k_BTKE = project(self.key, x, self.key_bias)
        v_BTKE = project(self.value, x, self.value_bias)
        if self.query_norm is not None:
            q_BTKGE = rms_norm(q_BTKGE, self.query_norm, self.norm_eps)
            k_BTKE = rms_norm(k_BTKE, self.key_norm, self.norm_eps)
        if context.rotary is not None:
            q_BTKGE, k_BTKE = (rotate(y, *context.rotary) for y in (q_BTKGE, k_BTKE))
        if context.cache is None:
            return dot_product_attention(
                q_BTKGE, k_BTKE, v_BTKE, context.segment_ids, implementation=context.attention
            )
        cache = context.cache
        keys, values = cache.append("keys", k_BTKE), cache.append("values", v_BTKE)
        return attend_chunk(
            cache.used, q_BTKGE, keys, values, context.segment_ids, cache.segment_ids
        )

    def predicted_activations(self, x: Float[Array, "B T D"]) -> Float[Array, "B T K G E"]:
        """Return every head's value at low rank, as if each token attended to itself: the weights
        of attention are what a cheap prediction cannot know."""
        v_BTKE, query_heads = self.predicted("value", x), self.query.get_value().shape[1]
        shape = (*v_BTKE.shape[:3], query_heads, v_BTKE.shape[-1])
        return jnp.broadcast_to(v_BTKE[:, :, :, None], shape)

    def empty_cache(self, batch: int, slots: int, dtype: str) -> dict[str, Array]:
        """Return keys and values `[L, B, S, K, E]`."""
        layers, groups, size, _ = self.key.get_value().shape
        shape = (layers, batch, slots, groups, size)
        return {"keys": jnp.zeros(shape, dtype), "values": jnp.zeros(shape, dtype)}

    def mixing_flops(self, length: float) -> float:
        """Return operations of q · k and weights · v, for a query head and a token: query t of a
        row meets t keys, (T + 1) / 2 on average."""
        return 2 * 2 * self.query.get_value().shape[-2] * (length + 1) / 2
