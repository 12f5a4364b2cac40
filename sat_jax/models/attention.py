"""Grouped-query attention whose weights keep the head axes in front.

Query heads are group-major: query head `q` belongs to KV group `q // G`. Keeping a head or a whole
group is taking rows, and multi-head attention is the case of one query head a group.
"""

from typing import NamedTuple

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from sat_jax.models.dot_product import Implementation, dot_product_attention
from sat_jax.models.layers import (
    Mask,
    Offset,
    WholeMatrices,
    indicator,
    normal,
    rms_norm,
    rows_in_place,
    with_offset,
)
from sat_jax.models.llama_config import LlamaConfig
from sat_jax.models.rope import rotate
from sat_jax.sparsity.plan import Segment

_OF_HEADS = ("query", "output", "query_bias")
_OF_GROUPS = ("key", "value", "key_bias", "value_bias")


class Rows(NamedTuple):
    """What a layer needs to know of the batch: documents and rotary angles.

    `segment_ids` int32 `[B, T]` (0 is padding); `cos` and `sin` float32 `[B, T, E/2]`.
    """

    segment_ids: Int[Array, "B T"]
    cos: Float[Array, "B T half"]
    sin: Float[Array, "B T half"]


class Attention(nnx.Module):
    """Attention weights of the layers of one segment, stacked on a leading axis L.

    `query` and `output` are `[L, K, G, E, D]`, `key` and `value` `[L, K, E, D]`, with K kept KV
    groups of G kept query heads. In mask execution K and G stay whole and `kept_heads` holds the
    kept indices: `[L, kept]` groups, or `[L, K, kept]` query heads within each group. `live`: they
    stay whole, and what is kept is chosen later (see `models.live`). `in_place`: `whole` has the
    matrices that they are rows of.
    """

    def __init__(
        self,
        config: LlamaConfig,
        segment: Segment,
        *,
        masked: bool = False,
        live: bool = False,
        in_place: bool = False,
        rngs: nnx.Rngs,
    ):
        layers, groups, heads = segment.layers, segment.kv_groups, segment.query_heads
        kept = None if live else _first_heads(config, segment)
        if masked or live:
            groups, heads = config.n_kv_heads, config.query_heads
        width, size = config.d_model, config.head_dim
        out_scale = 0.02 / (2 * config.n_layers) ** 0.5
        self.query = nnx.Param(normal(rngs, (layers, groups, heads, size, width), 0.02))
        self.key = nnx.Param(normal(rngs, (layers, groups, size, width), 0.02))
        self.value = nnx.Param(normal(rngs, (layers, groups, size, width), 0.02))
        self.output = nnx.Param(normal(rngs, (layers, groups, heads, size, width), out_scale))
        bias, norm = config.qkv_bias, config.qk_norm
        self.query_bias = nnx.Param(jnp.zeros((layers, groups, heads, size))) if bias else None
        self.key_bias = nnx.Param(jnp.zeros((layers, groups, size))) if bias else None
        self.value_bias = nnx.Param(jnp.zeros((layers, groups, size))) if bias else None
        self.query_norm = nnx.Param(jnp.ones((layers, size))) if norm else None
        self.key_norm = nnx.Param(jnp.ones((layers, size))) if norm else None
        self.kept_heads = Mask(kept) if masked and kept is not None else None
        adds = segment.compensate and kept is not None
        kept_shape = (layers, segment.kv_groups, segment.query_heads, size, width)
        self.output_offset = Offset(jnp.zeros(kept_shape)) if adds else None
        self.inverted = False
        whole = (config.n_kv_heads, config.query_heads)
        self.whole = self._whole(kept, whole) if in_place and kept is not None else None
        self.norm_eps = config.norm_eps

    def _whole(self, kept: Int[Array, "L *K kept"], heads: tuple[int, int]) -> WholeMatrices:
        """Zeros in the place of the matrices, which `heads` (KV groups, query heads in each) say
        the size of."""
        there = self._with_heads(groups=kept.ndim == 2)
        shapes = {}
        for name, rows in there.items():
            axes = 2 if name in _OF_HEADS else 1
            shapes[name] = (rows.shape[0], *heads[:axes], *rows.shape[1 + axes :])
        return WholeMatrices(kept, {name: jnp.zeros(shape) for name, shape in shapes.items()})

    def taken(self) -> "Attention":
        """One layer's module whose weights are taken from where they lie."""
        if self.whole is None:
            return self
        small: Attention = nnx.merge(*nnx.split(self))
        kept = self.whole.kept[...]
        for name, rows in self._with_heads(groups=kept.ndim == 1).items():
            taken = rows_in_place(self.whole.matrix(name), rows[...], kept)
            setattr(small, name, nnx.Param(taken))
        return small

    def others(self) -> "Attention | None":
        """One layer's module of the omitted heads, where the weights are whole; None: there are
        none. Its parameters are not for training."""
        if self.kept_heads is None and self.whole is None:
            return None
        rest: Attention = nnx.merge(*nnx.split(self))
        rest.inverted = True
        if self.whole is not None:
            axis = self.whole.kept.ndim - 1
            rest.whole = self.whole.others(self.whole.matrix("query").shape[axis])
            omitted = rest.whole.kept.shape[-1]
            for name, rows in self._with_heads(groups=axis == 0).items():
                shape = (*rows.shape[:axis], omitted, *rows.shape[axis + 1 :])
                setattr(rest, name, nnx.Param(jnp.zeros(shape, rows.dtype)))
        return rest

    def _with_heads(self, groups: bool) -> dict[str, nnx.Param]:
        """The parameters of which a query head has a part, and if `groups` those of KV groups."""
        names = (*_OF_HEADS, *_OF_GROUPS) if groups else _OF_HEADS
        return {name: x for name in names if (x := getattr(self, name)) is not None}

    def project(
        self, x_BTD: Float[Array, "B T D"], rows: Rows
    ) -> tuple[Float[Array, "B T K G E"], Float[Array, "B T K E"], Float[Array, "B T K E"]]:
        """Rotated queries and keys, and values, of one layer (the L axis already taken away)."""
        q_BTKGE = jnp.einsum("BTD,KGED->BTKGE", x_BTD, self.query[...])
        k_BTKE = jnp.einsum("BTD,KED->BTKE", x_BTD, self.key[...])
        v_BTKE = jnp.einsum("BTD,KED->BTKE", x_BTD, self.value[...])
        q_BTKGE = _with_bias(q_BTKGE, self.query_bias)
        k_BTKE = _with_bias(k_BTKE, self.key_bias)
        v_BTKE = _with_bias(v_BTKE, self.value_bias)
        if self.query_norm is not None:
            q_BTKGE = rms_norm(q_BTKGE, self.query_norm[...], self.norm_eps)
        if self.key_norm is not None:
            k_BTKE = rms_norm(k_BTKE, self.key_norm[...], self.norm_eps)
        return rotate(q_BTKGE, rows.cos, rows.sin), rotate(k_BTKE, rows.cos, rows.sin), v_BTKE

    def mix(
        self, x_BTD: Float[Array, "B T D"], rows: Rows, implementation: Implementation | None
    ) -> Float[Array, "B T K G E"]:
        """Every kept head's value mix; omitted heads are zero in mask execution."""
        q_BTKGE, k_BTKE, v_BTKE = self.project(x_BTD, rows)
        o_BTKGE = dot_product_attention(
            q_BTKGE, k_BTKE, v_BTKE, rows.segment_ids, implementation=implementation
        )
        if self.kept_heads is None:
            return o_BTKGE
        groups, heads = o_BTKGE.shape[2:4]
        keep_KG = _keep_KG(self.kept_heads[...], groups, heads, o_BTKGE.dtype)
        return o_BTKGE * (1 - keep_KG if self.inverted else keep_KG)[..., None]

    def __call__(
        self, x_BTD: Float[Array, "B T D"], rows: Rows, implementation: Implementation | None
    ) -> Float[Array, "B T D"]:
        """What one layer adds to the residual stream."""
        return self.combine(self.mix(x_BTD, rows, implementation))

    def combine(self, o_BTKGE: Float[Array, "B T K G E"]) -> Float[Array, "B T D"]:
        """What the heads add to the residual stream."""
        output_KGED = with_offset(self.output[...], self.output_offset, self.kept_heads)
        return jnp.einsum("BTKGE,KGED->BTD", o_BTKGE, output_KGED)


def _with_bias(x: Array, bias: nnx.Param | None) -> Array:
    return x if bias is None else x + bias[...][None, None]


def _keep_KG(
    kept: Int[Array, "*lead kept"], groups: int, heads: int, dtype: jnp.dtype
) -> Float[Array, "1 1 K G"]:
    """0/1 over the heads of one layer, derived from the kept indices."""
    if kept.ndim == 1:
        keep_KG = jnp.broadcast_to(indicator(kept, groups, dtype)[:, None], (groups, heads))
    else:
        keep_KG = indicator(kept, heads, dtype)
    return keep_KG[None, None]


def _first_heads(config: LlamaConfig, segment: Segment) -> Int[Array, "L *lead kept"] | None:
    """Where mask execution starts: the first heads are the kept ones. None: all are kept."""
    if segment.query_heads < config.query_heads:
        shape: tuple[int, ...] = (segment.layers, config.n_kv_heads, segment.query_heads)
    elif segment.kv_groups < config.n_kv_heads:
        shape = (segment.layers, segment.kv_groups)
    else:
        return None
    return jnp.broadcast_to(jnp.arange(shape[-1], dtype=jnp.int32), shape)


def output_energy(
    o_BTKGE: Float[Array, "B T K G E"],
    output_KGED: Float[Array, "K G E D"],
    weight_BT: Float[Array, "B T"],
) -> Float[Array, "K G G"]:
    """Σ over tokens of ⟨o_g W_o,g , o_h W_o,h⟩ for every pair of query heads in a group, float32.

    The diagonal is what each head adds to the residual stream, ‖o_h W_o,h‖²; the sum over a
    group's G × G entries is what the whole group adds. Through Gram matrices, so that no
    `[tokens, heads, D]` array exists.
    """
    o = o_BTKGE.astype(jnp.float32) * weight_BT[:, :, None, None, None]
    w = output_KGED.astype(jnp.float32)
    mixes = jnp.einsum("BTKGE,BTKHF->KGEHF", o, o)
    weights = jnp.einsum("KGED,KHFD->KGEHF", w, w)
    return jnp.einsum("KGEHF,KGEHF->KGH", mixes, weights)
