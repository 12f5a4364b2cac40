"""The base class of all decoder families: hidden states, logits and decoding."""

import dataclasses
import math
from collections.abc import Collection
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray

from sat_jax.nn.attention.dot_product import Implementation
from sat_jax.nn.branch import branches
from sat_jax.nn.context import Cache, Context, LayerTokens, Observable, Observed, Selection
from sat_jax.nn.linear import dense
from sat_jax.nn.mesh_axes import full_rows
from sat_jax.nn.param import Control
from sat_jax.nn.pipeline import number_of_stages, pipeline_layers
from sat_jax.nn.rope import document_lengths, rotary_tables, scaled_by_length
from sat_jax.nn.stack import Remat, cast, scan_layers
from sat_jax.ops import RetentionKernel

# Tokens per forward pass where the slots of a cache are computed again.
_CHUNK = 512


@dataclasses.dataclass(frozen=True)
class Compute:
    """How the function is computed; changes no value beyond rounding.

    `remat`: what the backward pass finds saved: `none` everything, `dots` matmul outputs, `full`
    each layer's input only. `loss_chunk`: positions of each row whose logits exist at once.
    `attention`: a backend by name; None chooses by platform. `microbatches`: parts of the rows that
    pass through a pipeline, on a mesh with one; 1: all rows pass through the layers one by one, and
    each layer's weights are sent to all stages. `retention`: its implementation by name.
    """

    dtype: Literal["float32", "bfloat16"] = "float32"
    remat: Remat = "none"
    loss_chunk: int = 512
    attention: Implementation | None = None
    microbatches: int = 1
    retention: RetentionKernel = "xla"


class Decoder(nnx.Module):
    """Base of the families: token embedding `[V, D]`, a block `layers`, and a head `[V, D]`, which
    is the embedding where it is None."""

    config: Any  # the family's `DecoderConfig`
    compute: Compute
    embed: nnx.Param
    layers: nnx.Module
    lm_head: nnx.Param | None

    @property
    def pipelined(self) -> bool:
        """Whether the layers are computed in the stages of a pipeline."""
        return number_of_stages() > 1 and self.compute.microbatches > 1

    def embed_tokens(
        self, tokens: Int[Array, "B T"], positions: Int[Array, "B T"]
    ) -> Float[Array, "B T D"]:
        """Return the residual stream before the first layer, float32: rows of the embedding."""
        del positions
        return lookup(self.embed, tokens)

    def normalize(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Return the normed residual stream after the last layer."""
        raise NotImplementedError

    def head(self) -> Float[Array, "V D"]:
        """Return the output embedding in the compute dtype."""
        weight = self.embed if self.lm_head is None else self.lm_head
        return dense(weight).astype(self.compute.dtype)

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"] | None = None,
        positions: Int[Array, "B T"] | None = None,
    ) -> Float[Array, "B T V"]:
        """Return logits, float32. By default every row is one document."""
        if segment_ids is None:
            segment_ids = jnp.ones_like(tokens)
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        x_BTD, _ = self.hidden(tokens, segment_ids, positions)
        return jnp.einsum("BTD,VD->BTV", x_BTD, self.head(), preferred_element_type=jnp.float32)

    def hidden(
        self,
        tokens: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        *,
        observe: Collection[Observable] = (),
        selection: Selection | None = None,
        key: PRNGKeyArray | None = None,
        layer_tokens: LayerTokens = (),
    ) -> tuple[Float[Array, "B T D"], tuple[Observed, ...]]:
        """Return the normed residual stream after the last layer, and what each segment's layers
        observed. `selection` chooses units in each layer; it needs a `key`. `layer_tokens` are
        those that the layers process."""
        x_BTD = self.embed_tokens(tokens, positions).astype(self.compute.dtype)
        x_BTD, observed = self.apply_layers(
            x_BTD,
            segment_ids,
            positions,
            observe=observe,
            selection=selection,
            key=key,
            layer_tokens=layer_tokens,
        )
        return self.normalize(x_BTD), observed

    def apply_layers(
        self,
        x_BTD: Float[Array, "B T D"],
        segment_ids: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        *,
        observe: Collection[Observable] = (),
        selection: Selection | None = None,
        key: PRNGKeyArray | None = None,
        layer_tokens: LayerTokens = (),
    ) -> tuple[Float[Array, "B T D"], tuple[Observed, ...]]:
        """Return the residual stream after the layers, and what each segment's layers observed.

        `x_BTD` is the residual stream before them. The model may have any number of layers, also of
        a part of its layers alone.
        """
        dynamic = self.config.has_dynamic_rope
        lengths = document_lengths(segment_ids, positions) if dynamic else None
        context = Context(
            segment_ids,
            self.rotary(positions, lengths),
            self.compute.attention,
            self.compute.retention,
            observe,
            selection,
            key,
            layer_tokens,
        )
        compute = self.compute
        options: Any = {"dtype": compute.dtype, "remat": compute.remat}
        if self.pipelined:
            options["microbatches"] = compute.microbatches
            return pipeline_layers(self.layers, x_BTD, context, **options), ({},)
        x_BTD, observed, _ = scan_layers(self.layers, x_BTD, context, **options)
        return x_BTD, observed

    def empty_cache(self, batch: int, slots: int) -> Cache:
        """Return a cache for `batch` rows of `slots` tokens, of which none is used."""
        arrays: dict[str, Array] = {}
        parts = branches(self.layers).values()
        for branch in parts:
            arrays |= branch.empty_cache(batch, slots, self.compute.dtype)
        if not any(branch.caches_tokens for branch in parts):
            slots = 0
        zeros = jnp.zeros((batch, slots), jnp.int32)
        return Cache(arrays, zeros, zeros, zeros, jnp.zeros((), jnp.int32))

    def extend(
        self,
        cache: Cache,
        tokens: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"],
        positions: Int[Array, "B T"],
    ) -> tuple[Float[Array, "B T D"], Cache]:
        """Return the normed residual stream of T more tokens, and the cache with them.

        It equals one pass over all tokens so far. Where the angles of RoPE depend on the length,
        and are now other than those in the cache, every slot is computed again: not the keys alone
        change, but with them the inputs of all layers after the first.
        """
        cache, count = cache.write(tokens, segment_ids, positions), tokens.shape[1]
        if not self.config.has_dynamic_rope:
            return self.advance(cache, tokens, segment_ids, positions)
        ends = (cache.used, cache.used + count)
        lengths = jnp.stack([cache.row_lengths(end) for end in ends])
        frequencies, scale = scaled_by_length(self.config.rope, self.config.rotary_dim, lengths)
        changed = jnp.any(frequencies[0] != frequencies[1]) | jnp.any(scale[0] != scale[1])
        return jax.lax.cond(
            changed & (cache.used > 0),
            lambda cache: self._compute_again(cache, count),
            lambda cache: self.advance(cache, tokens, segment_ids, positions),
            cache,
        )

    def advance(
        self,
        cache: Cache,
        tokens: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"],
        positions: Int[Array, "B T"],
    ) -> tuple[Float[Array, "B T D"], Cache]:
        """Return the normed residual stream of the next T tokens, which are written in the cache,
        and the cache with their keys or states. Angles are for all written tokens of a row."""
        lengths = None
        if self.config.has_dynamic_rope:
            written = cache.row_lengths(cache.tokens.shape[1])[:, None]
            lengths = jnp.broadcast_to(written, positions.shape)
        rotary = self.rotary(positions, lengths)
        compute = self.compute
        context = Context(segment_ids, rotary, compute.attention, compute.retention)
        x_BTD = self.embed_tokens(tokens, positions).astype(self.compute.dtype)
        x_BTD, _, extended = scan_layers(
            self.layers, x_BTD, context, dtype=compute.dtype, cache=cache
        )
        assert extended is not None
        return self.normalize(x_BTD), extended

    def _compute_again(self, cache: Cache, count: int) -> tuple[Float[Array, "B T D"], Cache]:
        """Return `extend`'s result after all slots before have been computed again."""
        slots = cache.tokens.shape[1]
        # Chunks of one size that fill the slots exactly; those after the last token are not run.
        chunk, end = math.gcd(slots, _CHUNK), cache.used + count

        def body(index: Array, carry: tuple[Cache, Array]) -> tuple[Cache, Array]:
            cache, x_BSD = carry
            x_BTD, cache = self.advance(cache, *cache.newest(chunk))
            return cache, jax.lax.dynamic_update_slice(x_BSD, x_BTD, (0, index * chunk, 0))

        shape = (len(cache.tokens), slots, self.config.d_model)
        start = (
            cache._replace(used=jnp.zeros_like(cache.used)),
            jnp.zeros(shape, self.compute.dtype),
        )
        computed, x_BSD = jax.lax.fori_loop(0, -(-end // chunk), body, start)
        newest = jax.lax.dynamic_slice_in_dim(x_BSD, cache.used, count, axis=1)
        return newest, computed._replace(used=end)

    def rotary(
        self, positions: Int[Array, "B T"], lengths: Int[Array, "B T"] | None
    ) -> tuple[Array, Array] | None:
        """Return cosines and sines `[B, T, rotated / 2]`; None: positions are not rotated."""
        rope = self.config.rope
        if rope is None:
            return None
        return rotary_tables(rope, self.config.rotary_dim, positions, lengths)


def lookup(table: Any, ids: Int[Array, "B T"]) -> Float[Array, "B T D"]:
    """Return rows of a parameter `[N, D]`."""
    return jnp.take(full_rows(dense(table)), ids, axis=0)


def for_decoding(model: Decoder) -> Decoder:
    """Return the model with its weights in the compute dtype once, instead of at every token.

    Raises `ValueError` for a model with omitted units.
    """
    graph, masks, params = nnx.split(model, Control, ...)  # type: ignore[misc]
    tuples = jax.tree.leaves(params, is_leaf=lambda value: type(value) is tuple)
    if jax.tree.leaves(masks) or any(type(value) is tuple for value in tuples):
        raise ValueError("a model with omitted units cannot decode; expand it first")
    decoding: Decoder = nnx.merge(graph, masks, cast(params, model.compute.dtype))
    return decoding
