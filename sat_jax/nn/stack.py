"""Scan over the layers of a block whose arrays have the layers in front, `[L, ...]`.

A parameter may hold a tuple, with one entry for each segment: a run of contiguous layers that keep
the same number of units. Segments are scanned one after the other.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from sat_jax.nn.context import HIDDEN, Cache, Context, LayerCache, Observed
from sat_jax.nn.linear import PRODUCT, Weight
from sat_jax.nn.token_places import put_tokens, take_tokens

Remat = Literal["none", "dots", "full"]
SELECTED = "selected units"
"""The name under which `jax.checkpoint` saves what a dynamic selection kept: the backward pass must
not select again, from inputs that it computes again and may round otherwise."""


def _all_but_slices(primitive: Any, *_: Any, **__: Any) -> bool:
    """Save everything but slices of arrays that are saved anyway, such as stacked weights."""
    return primitive is not jax.lax.dynamic_slice_p


_policies = jax.checkpoint_policies
POLICIES: dict[Remat, Callable[..., Any]] = {
    "none": _all_but_slices,
    "dots": _policies.save_from_both_policies(
        _policies.dots_with_no_batch_dims_saveable, _policies.save_only_these_names(PRODUCT)
    ),
    "full": _policies.nothing_saveable,
}


def scan_layers(
    block: nnx.Module,
    x: Float[Array, "B T D"],
    context: Context,
    *,
    dtype: str,
    remat: Remat = "none",
    cache: Cache | None = None,
) -> tuple[Float[Array, "B T D"], tuple[Observed, ...], Cache | None]:
    """Return the residual stream after all layers, what each segment's layers observed (`[L, ...]`
    in front), and the extended cache. Weights are cast to `dtype` inside each layer. Tokens that
    `context.layer_tokens` leaves out of a layer pass it unchanged."""
    graph, state = nnx.split(block)
    parts = segments_of(state)
    lengths = [len(jax.tree.leaves(part)[0]) for part in parts]
    assert cache is None or len(parts) == 1, "decoding is of a model in one segment"
    tokens = context.layer_tokens or (None,) * len(parts)
    keys = None if context.key is None else jax.random.split(context.key, sum(lengths))
    policy = _policies.save_from_both_policies(
        POLICIES[remat], _policies.save_only_these_names(SELECTED)
    )
    arrays = None if cache is None else cache.arrays
    observed, start = [], 0
    for number, (part, layers) in enumerate(zip(parts, lengths, strict=True)):

        def layer(carry: Any, inputs: Any, number: int = number) -> Any:
            x, arrays = carry
            values, key, index, places = inputs
            layer_cache = None
            if cache is not None:
                layer_cache = LayerCache(dict(arrays), cache.segment_ids, cache.used, index)
            own = dataclasses.replace(
                context, key=key, segment=number, cache=layer_cache, observed={}
            )
            block = nnx.merge(graph, cast(values, dtype))
            x = block(x, own) if places is None else _on_tokens(block, x, own, places)
            if HIDDEN in context.observe:
                own.observed[HIDDEN] = {HIDDEN: x}
            return (x, None if layer_cache is None else layer_cache.arrays), own.observed

        body = layer if remat == "none" else jax.checkpoint(layer, policy=policy, prevent_cse=False)
        own_keys = None if keys is None else keys[start : start + layers]
        index = None if cache is None else jnp.arange(layers)
        (x, arrays), seen = jax.lax.scan(body, (x, arrays), (part, own_keys, index, tokens[number]))
        observed.append(seen)
        start += layers
    if cache is not None and arrays is not None:
        cache = cache._replace(arrays=arrays, used=cache.used + x.shape[1])
    return x, tuple(observed), cache


def _on_tokens(
    block: Any, x: Float[Array, "B T D"], context: Context, places: Int[Array, "B k"]
) -> Float[Array, "B T D"]:
    """Return the residual stream in which a layer has processed the tokens at `places` alone. It
    sees no other token; these keep their documents and positions."""
    rotary = context.rotary and tuple(take_tokens(table, places) for table in context.rotary)
    segment_ids = take_tokens(context.segment_ids, places)
    y = block(
        take_tokens(x, places), dataclasses.replace(context, segment_ids=segment_ids, rotary=rotary)
    )
    return put_tokens(x, places, y)


def cast(state: Any, dtype: str) -> Any:
    """Return a state with its weights in the compute dtype: the one place where they leave float32.
    Norm scales, biases, masks, indices and the fields `Weight.float32` keep their dtype."""

    def cast_array(array: Array) -> Array:
        return array.astype(dtype) if jnp.issubdtype(array.dtype, jnp.floating) else array

    def cast_value(value: Any) -> Any:
        if not isinstance(value, Weight):
            return cast_array(value)
        # A weight may be a field of another one, with a `float32` of its own.
        inside = jax.tree.map(
            cast_value, value, is_leaf=lambda v: v is not value and isinstance(v, Weight)
        )
        return dataclasses.replace(inside, **{n: getattr(value, n) for n in value.float32})

    def cast_variable(variable: Any) -> Any:
        if getattr(variable, "role", "vector") == "vector":
            return variable
        return jax.tree.map(cast_value, variable, is_leaf=lambda v: isinstance(v, Weight))

    return jax.tree.map(cast_variable, state, is_leaf=lambda v: isinstance(v, nnx.Variable))


def segments_of(state: nnx.State) -> list[nnx.State]:
    """Return the state of each segment."""

    def is_segmented(value: Any) -> bool:
        return type(value) is tuple

    leaves = jax.tree.leaves(state, is_leaf=is_segmented)
    number = max((len(v) for v in leaves if is_segmented(v)), default=0)
    if number == 0:
        return [state]
    return [jax.tree.map(lambda v, n=n: v[n], state, is_leaf=is_segmented) for n in range(number)]
