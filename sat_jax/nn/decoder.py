"""The base class of all decoder families: hidden states, logits and decoding."""

import dataclasses
from collections.abc import Collection
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray

from sat_jax.nn.attention.dot_product import Implementation
from sat_jax.nn.branch import branches
from sat_jax.nn.context import Cache, Context, Observable, Observed, Selection
from sat_jax.nn.linear import dense
from sat_jax.nn.param import Mask
from sat_jax.nn.pipeline import number_of_stages, pipeline_layers
from sat_jax.nn.rope import rotary_tables
from sat_jax.nn.stack import Remat, cast, scan_layers


@dataclasses.dataclass(frozen=True)
class Compute:
    """How the function is computed; changes no value beyond rounding.

    `remat`: what the backward pass finds saved: `none` everything, `dots` matmul outputs, `full`
    each layer's input only. `loss_chunk`: positions of each row whose logits exist at once.
    `attention`: a backend by name; None chooses by platform. `microbatches`: parts of the rows that
    pass through a pipeline, on a mesh with one.
    """

    dtype: Literal["float32", "bfloat16"] = "float32"
    remat: Remat = "none"
    loss_chunk: int = 512
    attention: Implementation | None = None
    microbatches: int = 1


class Decoder(nnx.Module):
    """Base of the families: token embedding `[V, D]`, a block `layers`, and a head `[V, D]`, which
    is the embedding where it is None."""

    config: Any  # the family's `DecoderConfig`
    compute: Compute
    embed: nnx.Param
    layers: nnx.Module
    lm_head: nnx.Param | None

    def embed_tokens(
        self, tokens: Int[Array, "B T"], positions: Int[Array, "B T"]
    ) -> Float[Array, "B T D"]:
        """Return the residual stream before the first layer, float32: rows of the embedding."""
        del positions
        return jnp.take(dense(self.embed), tokens, axis=0)

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
    ) -> tuple[Float[Array, "B T D"], tuple[Observed, ...]]:
        """Return the normed residual stream after the last layer, and what each segment's layers
        observed. `selection` chooses units in each layer; it needs a `key`."""
        context = Context(
            segment_ids,
            self.rotary(positions),
            self.compute.attention,
            observe,
            selection,
            key,
        )
        x_BTD = self.embed_tokens(tokens, positions).astype(self.compute.dtype)
        compute = self.compute
        options: Any = {"dtype": compute.dtype, "remat": compute.remat}
        if number_of_stages() > 1:
            options["microbatches"] = compute.microbatches
            return self.normalize(pipeline_layers(self.layers, x_BTD, context, **options)), ({},)
        x_BTD, observed, _ = scan_layers(self.layers, x_BTD, context, **options)
        return self.normalize(x_BTD), observed

    def empty_cache(self, batch: int, slots: int) -> Cache:
        """Return a cache for `batch` rows of `slots` tokens, of which none is used."""
        arrays: dict[str, Array] = {}
        parts = branches(self.layers).values()
        for branch in parts:
            arrays |= branch.empty_cache(batch, slots, self.compute.dtype)
        if not any(branch.caches_tokens for branch in parts):
            slots = 0
        segment_ids = jnp.zeros((batch, slots), jnp.int32)
        return Cache(arrays, segment_ids, jnp.zeros((), jnp.int32))

    def extend(
        self,
        cache: Cache,
        tokens: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        length: int,
    ) -> tuple[Float[Array, "B T D"], Cache]:
        """Return the normed residual stream of T more tokens, and the cache with them.

        `length`: the whole planned length in tokens, from which `dynamic` RoPE derives its angles;
        the keys of one cache must agree on it.
        """
        seen = cache.segment_ids
        if seen.size:
            seen = jax.lax.dynamic_update_slice(seen, segment_ids, (0, cache.used))
        context = Context(segment_ids, self.rotary(positions, length), self.compute.attention)
        x_BTD = self.embed_tokens(tokens, positions).astype(self.compute.dtype)
        x_BTD, _, extended = scan_layers(
            self.layers,
            x_BTD,
            context,
            dtype=self.compute.dtype,
            cache=cache._replace(segment_ids=seen),
        )
        assert extended is not None
        return self.normalize(x_BTD), extended

    def rotary(
        self, positions: Int[Array, "B T"], length: int | None = None
    ) -> tuple[Array, Array] | None:
        """Return cosines and sines `[B, T, rotated / 2]`; None: positions are not rotated."""
        rope = self.config.rope
        if rope is None:
            return None
        return rotary_tables(rope, self.config.rotary_dim, positions, length)


def for_decoding(model: Decoder) -> Decoder:
    """Return the model with its weights in the compute dtype once, instead of at every token.

    Raises `ValueError` for a model with omitted units.
    """
    graph, masks, params = nnx.split(model, Mask, ...)  # type: ignore[misc]
    tuples = jax.tree.leaves(params, is_leaf=lambda value: type(value) is tuple)
    if jax.tree.leaves(masks) or any(type(value) is tuple for value in tuples):
        raise ValueError("a model with omitted units cannot decode; expand it first")
    decoding: Decoder = nnx.merge(graph, masks, cast(params, model.compute.dtype))
    return decoding
