"""Multi-scale retention (Sun et al., arXiv:2307.08621), whose weights keep the heads in front.

Of every head: values are summed with exponentially decaying weights (`retention_forms`), each sum
is divided by its root mean square, multiplied by a gate silu(x · gate), and projected.
"""

import functools
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from sat_jax.nn.branch import Branch
from sat_jax.nn.context import Context, LayerCache
from sat_jax.nn.linear import dense, project
from sat_jax.nn.param import constant, normal, param
from sat_jax.nn.retention_forms import (
    Inputs,
    State,
    absolute_sums,
    chunkwise,
    recurrent,
    timeline,
)
from sat_jax.nn.rope import rotate
from sat_jax.ops import RetentionKernel, retention_refusal

Normalization = Literal["decay", "sum", "absolute_sum"]
"""The divisor of each sum over tokens, before the norm of its head. The norm cancels a factor,
apart from its eps. With W_t = √(Σ_s γ^(t - s)):

`decay`         W_t
`sum`           W_t · max(1, |Σ_s γ^(t - s) q_t · k_s| / W_t): torchscale 0.3.0
`absolute_sum`  W_t · clip(Σ_s γ^(t - s) |q_t · k_s| / W_t, 1, 5e4): torchscale from its repository

No state has the sum of absolute values. With `absolute_sum` decoding divides by W_t, as the
recurrent form of torchscale does; it then differs from a pass over the whole row, through eps."""


class Retention(Branch):
    """Retention of all layers, with H heads whose keys have size E and values size F.

    `query` and `key` are `[L, H, E, D]`, `value`, `gate` and `output` `[L, H, F, D]`. `log_decay`
    `[L, H]` is log(1 - 2^(-5 - h)). `chunk`: tokens whose pairs are computed at once.
    """

    units = ("head",)
    scored_by = ("query", "key", "value")

    def __init__(
        self,
        *,
        layers: int,
        heads: int,
        head_dim: int,
        value_dim: int,
        embed: int,
        out_scale: float,
        norm_eps: float,
        normalization: Normalization,
        chunk: int,
        rngs: nnx.Rngs,
    ):
        super().__init__()
        head = {"layer": layers, "head": heads}
        key_row = {"head_dim": head_dim, "embed": embed}
        value_row = {"value_dim": value_dim, "embed": embed}
        self.query = param(normal(rngs, 0.02), {**head, **key_row})
        self.key = param(normal(rngs, 0.02), {**head, **key_row})
        self.value = param(normal(rngs, 0.02), {**head, **value_row})
        self.gate = param(normal(rngs, 0.02), {**head, **value_row})
        self.output = param(normal(rngs, out_scale), {**head, **value_row}, "write")
        self.log_decay = constant(np.tile(log_decays(heads), (layers, 1)), ("layer", "head"))
        self.norm_eps, self.normalization, self.chunk = norm_eps, normalization, chunk

    def activations(self, x: Float[Array, "B T D"], context: Context) -> Float[Array, "B T H F"]:
        """Return the gated and normalised sum of values of every head."""
        q_BTHE, k_BTHE = project(self.query, x), project(self.key, x)
        k_BTHE = k_BTHE * k_BTHE.shape[-1] ** -0.5
        v_BTHF = project(self.value, x)
        if context.rotary is not None:
            q_BTHE, k_BTHE = (rotate(y, *context.rotary) for y in (q_BTHE, k_BTHE))
        normed = self.retain(q_BTHE, k_BTHE, v_BTHF, context)
        return jax.nn.silu(project(self.gate, x)) * normed.astype(x.dtype)

    def retain(
        self,
        q_BTHE: Float[Array, "B T H E"],
        k_BTHE: Float[Array, "B T H E"],
        v_BTHF: Float[Array, "B T H F"],
        context: Context,
    ) -> Float[Array, "B T H F"]:
        """Return the normalised sums, float32. In a model that decodes, one token is computed in
        the recurrent form; everything else in the chunkwise form."""
        log_decay_H, segment_ids, cache = dense(self.log_decay), context.segment_ids, context.cache
        if self.normalization == "sum":  # as a column of values
            v_BTHF = jnp.pad(v_BTHF, [(0, 0)] * 3 + [(0, 1)], constant_values=1)
        state = None if cache is None else _read(cache)
        one_token = cache is not None and segment_ids.shape[1] == 1
        in_chunks = functools.partial(chunkwise, chunk=self.chunk, implementation=context.retention)
        inputs = Inputs(q_BTHE, k_BTHE, v_BTHF, log_decay_H, segment_ids)
        o_BTHF, after = (recurrent if one_token else in_chunks)(inputs, state)
        if cache is not None:
            _write(cache, after)
        scale_BTH = decay_norms(log_decay_H, timeline(segment_ids, state).age)
        if self.normalization == "sum":
            o_BTHF, sums_BTH = o_BTHF[..., :-1], o_BTHF[..., -1]
            scale_BTH = jnp.maximum(scale_BTH, jnp.abs(sums_BTH))
        elif self.normalization == "absolute_sum" and cache is None:
            sums_BTH = absolute_sums(inputs, chunk=self.chunk)
            scale_BTH = scale_BTH * jnp.clip(sums_BTH / scale_BTH, 1, 5e4)
        return head_norm(o_BTHF, scale_BTH, self.norm_eps)

    def refusal(self, implementation: RetentionKernel, dtype: str, device: Any) -> str | None:
        """Return why a jax device does not support an implementation for these heads, or None if it
        does."""
        sizes = self.key.get_value().shape[2], self._columns
        return retention_refusal(implementation, dtype, *sizes, self.chunk, device)

    @property
    def _columns(self) -> int:
        """Columns of a state: the size of values, and with `sum` one more."""
        return self.value.get_value().shape[2] + (self.normalization == "sum")

    def predicted_activations(self, x: Float[Array, "B T D"]) -> Float[Array, "B T H F"]:
        """Return every head's activation at low rank, up to its sign, as if each token saw itself
        alone: the sums over tokens are what a cheap prediction cannot know."""
        v_BTHF = self.predicted("value", x)
        normed = head_norm(v_BTHF, jnp.ones(v_BTHF.shape[:3]), self.norm_eps)
        return jax.nn.silu(self.predicted("gate", x)) * normed

    def empty_cache(self, batch: int, slots: int, dtype: str) -> dict[str, Array]:
        """Return the states of no token (see `State`), whose size does not depend on `slots`."""
        del slots, dtype
        layers, heads, size, _ = self.key.get_value().shape
        zeros = jnp.zeros((layers, batch), jnp.int32)
        memory = jnp.zeros((layers, batch, heads, size, self._columns), jnp.float32)
        return {"memory": memory, "segment_id": zeros, "tokens": zeros}

    def mixing_flops(self, length: float) -> float:
        """Return operations of the chunkwise form for a head and a token: q · k and weights · v
        with the tokens up to it in the chunk, (C + 1) / 2 on average, the state's update and its
        product with q."""
        size, columns = self.key.get_value().shape[-2], self.value.get_value().shape[-2]
        pairs = 2 * (size + columns) * (min(length, self.chunk) + 1) / 2
        return pairs + 2 * 2 * size * columns


def chunk_of(size: int, columns: int) -> int:
    """Return the number of tokens of a chunk for heads with keys of `size` and values of `columns`:
    the largest power of two, from 16, with which the pairs within chunks take no more operations
    than the state (`Retention.mixing_flops`)."""
    balanced = 4 * size * columns / (size + columns)
    return max(16, 2 ** int(math.log2(balanced)))


def log_decays(heads: int) -> Float[np.ndarray, " H"]:
    """Return log γ_h = log(1 - 2^(-5 - h)) of every head, float64."""
    return np.log1p(-(2.0 ** (-5 - np.arange(heads))))


def decay_norms(
    log_decay_H: Float[Array, " H"], age_BT: Int[Array, "B T"]
) -> Float[Array, "B T H"]:
    """Return √(Σ γ^n), n < age: the norm of the decays that a token with `age` tokens of its
    document up to it sees. Padding sees itself alone."""
    ages = jnp.maximum(age_BT, 1)[..., None] * log_decay_H[None, None]
    return jnp.sqrt(jnp.expm1(ages) / jnp.expm1(log_decay_H)[None, None])


def head_norm(
    o_BTHF: Float[Array, "B T H F"], scale_BTH: Float[Array, "B T H"], eps: float
) -> Float[Array, "B T H F"]:
    """Return the RMS norm, without weights, of `o / scale` over the last axis.

    `scale` has no gradient, as in torchscale.
    """
    mean_square = jnp.mean(o_BTHF * o_BTHF, axis=-1, keepdims=True)
    floor = eps * jnp.square(jax.lax.stop_gradient(scale_BTH))[..., None]
    return o_BTHF * jax.lax.rsqrt(mean_square + floor)


def _read(cache: LayerCache) -> State:
    return State(*(cache.read(name) for name in State._fields))


def _write(cache: LayerCache, state: State) -> None:
    for name, value in state._asdict().items():
        cache.write(name, value)
