"""The Llama family: Llama, TinyLlama, SmolLM2, Mistral, Qwen2 (q/k/v bias), Qwen3 (q/k norm)."""

import dataclasses
from collections.abc import Callable, Collection
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from sat_jax.models.attention import Attention, Rows, output_energy
from sat_jax.models.dot_product import Implementation
from sat_jax.models.layers import normal, rms_norm
from sat_jax.models.live import Live, layer_choices, saving_kept
from sat_jax.models.llama_config import LlamaConfig
from sat_jax.models.loss import chunked_cross_entropy
from sat_jax.models.mlp import MLP
from sat_jax.models.observe import attention_input, channel_squares, column_products, mlp_input
from sat_jax.models.rope import rotary_tables
from sat_jax.ops import KernelConfig
from sat_jax.sparsity.masks import SegmentMasks
from sat_jax.sparsity.plan import Segment
from sat_jax.sparsity.statistics import Gates, Observable, Products, Statistics

Remat = Literal["none", "dots", "full"]


@dataclasses.dataclass(frozen=True)
class Compute:
    """How the function is computed; changes no value beyond rounding.

    `remat`: what the backward pass finds saved: `none` everything, `dots` matmul outputs, `full`
    each layer's input only. `loss_chunk`: positions of each row whose logits exist at once.
    `attention`: a backend by name, or None to choose by platform. `kernels`: they compute with
    kept channels where these lie in the whole matrices, and heads are taken from there layer by
    layer; not of a masked model.
    """

    dtype: Literal["float32", "bfloat16"] = "float32"
    remat: Remat = "none"
    loss_chunk: int = 512
    attention: Implementation | None = None
    kernels: KernelConfig | None = None


_POLICIES: dict[Remat, Callable[..., Any]] = {
    "none": jax.checkpoint_policies.everything_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


class Omitted(nnx.Module):
    """The omitted neurons of the layers of one segment, where what is kept is smaller matrices."""

    def __init__(self, attention: Attention | None, mlp: MLP | None):
        self.attention = attention
        self.mlp = mlp


def omitted_neurons(config: LlamaConfig, segment: Segment, rngs: nnx.Rngs) -> Omitted | None:
    """Those that are computed somewhere, none otherwise: channels for tokens that bear loss, or all
    that the segment omits for a forward pass that has them."""
    attention, mlp, omitted = None, None, config.omitted(segment)
    if omitted.kv_groups and segment.forward_all:
        attention = Attention(config, omitted, rngs=rngs)
    if omitted.channels and (segment.dense_tokens or segment.forward_all):
        mlp = MLP(config, omitted, rngs=rngs)
    return None if attention is None and mlp is None else Omitted(attention, mlp)


class Block(nnx.Module):
    """The layers of one segment; every parameter has the layers in front, `[L, ...]`."""

    def __init__(
        self,
        config: LlamaConfig,
        segment: Segment,
        *,
        masked: bool = False,
        live: Live | None = None,
        kernels: KernelConfig | None = None,
        rngs: nnx.Rngs,
    ):
        kind: Any = {"masked": masked, "live": live is not None, "rngs": rngs}
        self.attention_norm = nnx.Param(jnp.ones((segment.layers, config.d_model)))
        in_place = kernels is not None
        self.attention = Attention(config, segment, in_place=in_place, **kind)
        self.mlp_norm = nnx.Param(jnp.ones((segment.layers, config.d_model)))
        self.mlp = MLP(config, segment, kernels=kernels, **kind)
        apart = not (masked or in_place or live is not None)
        self.omitted = omitted_neurons(config, segment, rngs) if apart else None
        self.forward_all = segment.forward_all
        self.norm_eps = config.norm_eps
        self.choose_heads, self.choose_channels = layer_choices(live, config, segment, masked)

    def __call__(
        self,
        x_BTD: Float[Array, "B T D"],
        rows: Rows,
        implementation: Implementation | None = None,
        observe: Collection[Observable] = (),
        gates: Gates | None = None,
        key: PRNGKeyArray | None = None,
    ) -> tuple[Float[Array, "B T D"], dict[str, Any]]:
        """One layer (the L axis taken away): new residual stream and what was observed; `kept` is
        what the layer chose itself."""
        seen: dict[str, Any] = {}
        weight_BT = (rows.segment_ids > 0).astype(jnp.float32)
        attention, mlp, kept = self.attention, self.mlp, SegmentMasks(None, None)

        normed = rms_norm(x_BTD, self.attention_norm[...], self.norm_eps)
        if self.choose_heads is not None:
            attention, heads = self.choose_heads(attention, normed, weight_BT, key)
            kept = kept._replace(heads=heads)
        attention = attention.taken()
        o_BTKGE = attention.mix(normed, rows, implementation)
        if gates is not None:
            o_BTKGE *= gates.heads[None, None, :, :, None].astype(o_BTKGE.dtype)
        x_BTD = x_BTD + attention.combine(o_BTKGE)
        other_heads, other_channels = self._forward_only()
        if other_heads is not None:
            added = other_heads.taken()(normed, rows, implementation)
            x_BTD = x_BTD + jax.lax.stop_gradient(added)
        seen |= attention_input(observe, self.attention, normed, weight_BT)
        if "outputs" in observe:
            seen["heads"] = output_energy(o_BTKGE, attention.output[...], weight_BT)

        normed = rms_norm(x_BTD, self.mlp_norm[...], self.norm_eps)
        if self.choose_channels is not None:
            mlp, channels = self.choose_channels(mlp, normed, weight_BT, key)
            kept = kept._replace(channels=channels)
        if gates is None and not {"outputs", "products"} & set(observe):
            x_BTD = x_BTD + mlp(normed, rows.learnt)
        else:
            a_BTF = mlp.activate(normed, rows.learnt)
            if gates is not None:
                a_BTF *= gates.channels[None, None].astype(a_BTF.dtype)
            x_BTD = x_BTD + mlp.combine(a_BTF)
            if "outputs" in observe:
                seen["channels"] = channel_squares(a_BTF, weight_BT)
            if "products" in observe:
                mixes = column_products(o_BTKGE, weight_BT)
                seen["products"] = Products(mixes, column_products(a_BTF, weight_BT))
        if other_channels is not None:
            x_BTD = x_BTD + jax.lax.stop_gradient(other_channels(normed))
        elif self.omitted is not None and self.omitted.mlp is not None:
            x_BTD = _add_omitted(x_BTD, normed, self.omitted.mlp, rows)
        seen |= mlp_input(observe, self.mlp, normed, weight_BT)
        return x_BTD, seen | {"kept": kept}

    def _forward_only(self) -> tuple[Attention | None, MLP | None]:
        """What computes the omitted neurons where the forward pass has them."""
        if not self.forward_all:
            return None, None
        if self.omitted is not None:
            return self.omitted.attention, self.omitted.mlp
        return self.attention.others(), self.mlp.others()


def _add_omitted(
    x_BTD: Float[Array, "B T D"], normed: Float[Array, "B T D"], omitted: MLP, rows: Rows
) -> Float[Array, "B T D"]:
    """The stream with what the omitted channels add at the tokens that bear loss."""
    assert rows.learnt is not None and rows.slots is not None
    at_BC1 = rows.slots[..., None]
    added_BCD = omitted(jnp.take_along_axis(normed, at_BC1, axis=1))
    learnt_BC = jnp.take_along_axis(rows.learnt, rows.slots, axis=1)
    added_BCD = jnp.where(learnt_BC[..., None], added_BCD, 0)
    # Row by row, so that on a mesh no row leaves its device.
    add = jax.vmap(lambda x_TD, at, more: x_TD.at[at].add(more, unique_indices=True))
    out: Array = add(x_BTD, rows.slots, added_BCD)
    return out


class Llama(nnx.Module):
    """Parameters by segment: one segment for a whole model, several for a sparse one.

    A segment that keeps less than everything has smaller matrices, or, if `masked`, whole matrices
    and the kept indices beside them: the same function, computed without saving anything. With
    `live` its matrices are whole, and each layer chooses what it keeps from the batch at hand.
    """

    def __init__(
        self,
        config: LlamaConfig,
        segments: tuple[Segment, ...] | None = None,
        compute: Compute = Compute(),
        *,
        masked: bool = False,
        live: Live | None = None,
        rngs: nnx.Rngs,
    ):
        self.config = config
        self.compute = compute
        self.embed = nnx.Param(normal(rngs, (config.vocab_size, config.d_model), 0.02))
        self.layers = nnx.List(
            [
                Block(config, segment, masked=masked, live=live, kernels=compute.kernels, rngs=rngs)
                for segment in segments or (config.dense,)
            ]
        )
        self.dense_tokens = max(
            (segment.dense_tokens for segment in segments or (config.dense,)), default=0
        )
        self.final_norm = nnx.Param(jnp.ones(config.d_model))
        head_shape = (config.vocab_size, config.d_model)
        tied = config.tie_embeddings
        self.lm_head = None if tied else nnx.Param(normal(rngs, head_shape, 0.02))

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"] | None = None,
        positions: Int[Array, "B T"] | None = None,
    ) -> Float[Array, "B T V"]:
        """Logits, float32. By default every row is one document."""
        if segment_ids is None:
            segment_ids = jnp.ones_like(tokens)
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        x_BTD, _ = self.hidden(tokens, segment_ids, positions)
        return jnp.einsum("BTD,VD->BTV", x_BTD, self.head(), preferred_element_type=jnp.float32)

    def head(self) -> Float[Array, "V D"]:
        """The output embedding in the compute dtype."""
        weight = self.embed if self.lm_head is None else self.lm_head
        head: Array = cast(weight[...], self.compute.dtype)
        return head

    def hidden(
        self,
        tokens: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        observe: Collection[Observable] = (),
        gates: Gates | None = None,
        learnt: Bool[Array, "B T"] | None = None,
        key: PRNGKeyArray | None = None,
    ) -> tuple[Float[Array, "B T D"], Statistics]:
        """The normed residual stream after the last layer, and what was asked to be observed.

        `gates` multiply the neurons' outputs, of a whole model only. `learnt`: the tokens that bear
        loss, for segments in which these use all channels; no more in a row than those allow. A
        live model needs a `key`.
        """
        assert gates is None or len(self.layers) == 1, "gates are for a whole model"
        config, compute = self.config, self.compute
        rows = Rows(segment_ids, *rotary_tables(config.rope, config.head_dim, positions))
        if self.dense_tokens:
            assert learnt is not None, "which tokens bear loss?"
            # Those that bear loss first, in their order.
            slots = jnp.argsort(~learnt, axis=1, stable=True)[:, : self.dense_tokens]
            rows = rows._replace(learnt=learnt, slots=slots)
        x_BTD = cast(jnp.take(self.embed[...], tokens, axis=0), compute.dtype)
        seen, kept, first = [], [], 0
        keys = None if key is None else jax.random.split(key, config.n_layers)
        for block in self.layers:
            graph, stacked = nnx.split(block)

            def layer(x: Array, one: tuple[nnx.State, Any], graph: Any = graph) -> Any:
                block = nnx.merge(graph, cast(one[0], compute.dtype))
                return block(x, rows, compute.attention, observe, *one[1:])

            policy = saving_kept(_POLICIES[compute.remat])
            body = jax.checkpoint(layer, policy=policy, prevent_cse=False)
            first, start = first + len(block.mlp_norm[...]), first
            own = None if keys is None else keys[start:first]
            x_BTD, observed = jax.lax.scan(body, x_BTD, (stacked, gates, own))
            kept.append(observed.pop("kept"))
            seen.append(observed)
        observed = jax.tree.map(lambda *parts: jnp.concatenate(parts), *seen)
        count = jnp.sum(segment_ids > 0).astype(jnp.float32)
        x_BTD = rms_norm(x_BTD, self.final_norm[...], config.norm_eps)
        chosen = tuple(kept) if jax.tree.leaves(kept) else None
        return x_BTD, Statistics(count=count, kept=chosen, **observed)

    def loss(
        self,
        tokens: Int[Array, "B T"],
        targets: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        loss_mask: Bool[Array, "B T"],
        observe: Collection[Observable] = (),
        gates: Gates | None = None,
        key: PRNGKeyArray | None = None,
    ) -> tuple[Float[Array, ""], Statistics]:
        """Sum over the masked-in tokens of the next-token cross-entropy (natural logarithm)."""
        x_BTD, seen = self.hidden(tokens, segment_ids, positions, observe, gates, loss_mask, key)
        total = chunked_cross_entropy(
            x_BTD, self.head(), targets, loss_mask, self.compute.loss_chunk
        )
        return total, seen


def cast(params: Any, dtype: str) -> Any:
    """Weights in the compute dtype: the one place where they leave float32. Indices stay what they
    are, and so do the scales of norms, which are computed in float32."""

    def one(path: tuple[Any, ...], p: Array) -> Array:
        stays = "norm" in jax.tree_util.keystr(path) or not jnp.issubdtype(p.dtype, jnp.floating)
        return p if stays else p.astype(dtype)

    return jax.tree_util.tree_map_with_path(one, params)
