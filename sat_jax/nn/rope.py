"""Rotary position embeddings and their length scalings.

Dimension i of a head is rotated together with dimension i + E/2 (the order of Hugging Face
checkpoints). Sources: Su et al. (arXiv:2104.09864); YaRN, Peng et al. (arXiv:2309.00071); the
`llama3` rule as released with Llama 3.1.
"""

import dataclasses
import math
from typing import Literal

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Int

RopeType = Literal["default", "linear", "dynamic", "yarn", "llama3"]


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding and its length scaling. Lengths are in tokens.

    `original_max_positions` is the length of the first training; all types except `default` and
    `linear` need it. `low_freq_factor` and `high_freq_factor` are for `llama3`; `beta_fast`,
    `beta_slow`, `truncate` and `attention_factor` (None: 0.1 ln(factor) + 1) for `yarn`.
    """

    theta: float = 10_000.0
    type: RopeType = "default"
    factor: float = 1.0
    original_max_positions: int | None = None
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float | None = None


def _original_length(rope: RopeConfig) -> int:
    if rope.original_max_positions is None:
        raise ValueError(f"rope type {rope.type!r} needs original_max_positions")
    return rope.original_max_positions


def _dynamic(rope: RopeConfig, head_dim: int, length: int) -> np.ndarray:
    """Return frequencies with the NTK-aware base for a `length` above the original one."""
    original = _original_length(rope)
    growth = rope.factor * max(length, original) / original - (rope.factor - 1)
    return _default(rope.theta * growth ** (head_dim / (head_dim - 2)), head_dim)


def _yarn(rope: RopeConfig, head_dim: int) -> np.ndarray:
    """Return NTK-by-parts frequencies: low ones interpolated, a linear ramp to unchanged ones."""
    original = _original_length(rope)

    def dimension_of(rotations: float) -> float:
        log = math.log(original / (rotations * 2 * math.pi))
        return head_dim * log / (2 * math.log(rope.theta))

    low, high = dimension_of(rope.beta_fast), dimension_of(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    high = high + 0.001 if low == high else high
    ramp = np.clip((np.arange(head_dim // 2) - low) / (high - low), 0, 1)
    frequencies = _default(rope.theta, head_dim)
    return frequencies * (1 - ramp) + frequencies / rope.factor * ramp


def _llama3(rope: RopeConfig, head_dim: int) -> np.ndarray:
    """Return frequencies: interpolated below `low_freq_factor` rotations, unchanged above
    `high_freq_factor`."""
    frequencies = _default(rope.theta, head_dim)
    rotations = _original_length(rope) * frequencies / (2 * math.pi)
    span = rope.high_freq_factor - rope.low_freq_factor
    keep = np.clip((rotations - rope.low_freq_factor) / span, 0, 1)
    return frequencies * keep + frequencies / rope.factor * (1 - keep)


def _default(theta: float, head_dim: int) -> np.ndarray:
    return theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)


def inverse_frequencies(rope: RopeConfig, head_dim: int, length: int) -> np.ndarray:
    """Return radians per position, float64 `[head_dim / 2]`. Only `dynamic` depends on `length`."""
    match rope.type:
        case "default":
            return _default(rope.theta, head_dim)
        case "linear":
            return _default(rope.theta, head_dim) / rope.factor
        case "dynamic":
            return _dynamic(rope, head_dim, length)
        case "yarn":
            return _yarn(rope, head_dim)
        case "llama3":
            return _llama3(rope, head_dim)
        case _:
            raise ValueError(f"rope type {rope.type!r} is unknown")


def attention_scaling(rope: RopeConfig) -> float:
    """Return the factor of cos and sin (YaRN equation 22), which is 1 for other types."""
    if rope.type != "yarn":
        return 1.0
    if rope.attention_factor is not None:
        return rope.attention_factor
    return 0.1 * math.log(rope.factor) + 1.0 if rope.factor > 1 else 1.0


def rotary_tables(
    rope: RopeConfig, head_dim: int, positions: Int[Array, "B T"], length: int | None = None
) -> tuple[Float[Array, "B T half"], Float[Array, "B T half"]]:
    """Return float32 (cos, sin). `length` (default T) is the sequence length of `dynamic`."""
    frequencies = inverse_frequencies(rope, head_dim, length or positions.shape[-1])
    cos, sin = rotations(frequencies, positions)
    scale = attention_scaling(rope)
    return cos * scale, sin * scale


def rotations(
    frequencies: ArrayLike, positions: Int[Array, "B T"]
) -> tuple[Float[Array, "B T half"], Float[Array, "B T half"]]:
    """Return float32 (cos, sin) of the angles of `frequencies` radians per position."""
    angles = positions[..., None] * jnp.asarray(frequencies, jnp.float32)[None, None]
    return jnp.cos(angles), jnp.sin(angles)


def rotate(
    x: Float[Array, "B T *heads E"], cos: Float[Array, "B T half"], sin: Float[Array, "B T half"]
) -> Float[Array, "B T *heads E"]:
    """Return queries or keys `[B, T, ..., E]` rotated in float32 or wider, in the dtype of `x`.

    The first `2 · half` dimensions of a head are rotated (partial rotary)."""
    lead = cos.shape[:2] + (1,) * (x.ndim - 3) + cos.shape[2:]
    cos, sin = cos.reshape(lead), sin.reshape(lead)
    rotated_dims = 2 * cos.shape[-1]
    wide = x[..., :rotated_dims].astype(jnp.promote_types(x.dtype, jnp.float32))
    first, second = jnp.split(wide, 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    rotated = rotated.astype(x.dtype)
    if rotated_dims == x.shape[-1]:
        return rotated
    return jnp.concatenate([rotated, x[..., rotated_dims:]], axis=-1)
