"""Rotary position embeddings and their length scalings.

Dimension i of a head is rotated together with dimension i + E/2 (the order of Hugging Face
checkpoints). Sources: Su et al. (arXiv:2104.09864); YaRN, Peng et al. (arXiv:2309.00071), whose
sections are cited below; LongRoPE, Ding et al. (arXiv:2402.13753); the `llama3` rule as released
with Llama 3.1. `docs/long-context.md` compares the scalings.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from sat_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding, and the scaling `type` (a name in `SCALINGS`). Lengths are in tokens.

    `original_max_positions` is the length of the first training. `factor` is the extension that the
    frequencies are scaled for; in `dynamic` the growth of the scaling with the length, in
    `dynamic_yarn` its smallest value (1: not trained at a longer length). `beta_fast` and
    `beta_slow` are rotations over the original length: frequencies above the first are unchanged,
    those below the second are divided by the factor. `low_freq_factor` and `high_freq_factor` are
    the same of `llama3`. `truncate` rounds the limits of a ramp over dimensions to whole ones.
    `attention_factor` multiplies cosines and sines (None: the rule of the type). `short_factor`
    and `long_factor` of `longrope` divide the frequencies, one for each pair of dimensions, up to
    the original length and above it. Raises `UserError` for a field that the type does not have,
    and for values without a meaning.
    """

    theta: float = 10_000.0
    type: str = "default"
    factor: float = 1.0
    original_max_positions: int | None = None
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float | None = None
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.type not in SCALINGS:
            raise UserError(
                f"rope type {self.type!r} is not supported; accepted: {', '.join(SCALINGS)}"
            )
        accepted = self.scaling.fields
        for field in dataclasses.fields(self)[2:]:
            if field.name not in accepted and getattr(self, field.name) != field.default:
                raise UserError(
                    f"{field.name} is no field of rope type {self.type!r}; "
                    f"accepted: {', '.join(accepted) or 'none'}"
                )
        if "original_max_positions" in accepted and (self.original_max_positions or 0) < 1:
            raise self._refuse("original_max_positions", "the trained length, 1 or more tokens")
        if not 1 <= self.factor < math.inf:
            raise self._refuse("factor", "a number of at least 1")
        if self.beta_fast <= self.beta_slow:
            raise self._refuse("beta_fast", f"a number above beta_slow {self.beta_slow:g}")
        if self.high_freq_factor <= self.low_freq_factor:
            accepted_text = f"a number above low_freq_factor {self.low_freq_factor:g}"
            raise self._refuse("high_freq_factor", accepted_text)
        for name in ("short_factor", "long_factor"):
            if name in accepted and min(getattr(self, name), default=0) <= 0:
                raise self._refuse(name, "positive numbers, one for each pair of dimensions")

    def _refuse(self, name: str, accepted: str) -> UserError:
        return UserError(
            f"rope type {self.type!r}: {name} {getattr(self, name)}; accepted: {accepted}"
        )

    @property
    def scaling(self) -> "Scaling":
        """The rule of the type."""
        return SCALINGS[self.type]

    @property
    def defined_length(self) -> int | None:
        """The length to which the type is defined, where this follows from its fields."""
        if not self.scaling.reaches_factor or self.original_max_positions is None:
            return None
        return int(self.factor * self.original_max_positions)


Length = Any
"""A length in tokens: an `int`, or a traced int32 scalar."""


@dataclasses.dataclass(frozen=True)
class Scaling:
    """A rule that scales rotary frequencies.

    `frequencies(rope, head_dim)` returns radians per position `[head_dim / 2]`, and
    `attention(rope)` the factor of cosines and sines (None: 1). With `by_length` both depend on the
    length of a document, their last argument. `fields` of `RopeConfig` are those that the rule
    reads. `unlimited`: defined at every length. `reaches_factor`: defined to `factor` times the
    original length. `in_transformers`: the type has the same name and meaning there.
    """

    frequencies: Callable[..., Any]
    fields: tuple[str, ...] = ()
    attention: Callable[..., Any] | None = None
    by_length: bool = False
    unlimited: bool = False
    reaches_factor: bool = False
    in_transformers: bool = False


def _numpy_of(length: Length) -> Any:
    return jnp if isinstance(length, jax.Array) else np


def _original(rope: RopeConfig) -> int:
    assert rope.original_max_positions is not None, "RopeConfig checks it"
    return rope.original_max_positions


def _base(theta: float, head_dim: int) -> np.ndarray:
    return theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)


def _default(rope: RopeConfig, head_dim: int) -> np.ndarray:
    """Return the frequencies theta^(-2i / head_dim)."""
    return _base(rope.theta, head_dim)


def _linear(rope: RopeConfig, head_dim: int) -> np.ndarray:
    """Return interpolated positions (section 2.3)."""
    return _base(rope.theta, head_dim) / rope.factor


def _with_larger_base(rope: RopeConfig, head_dim: int, growth: Any) -> Any:
    """Return frequencies with the base theta · growth^(d / (d - 2)): the lowest is divided by
    `growth`. Powers of `growth` are well conditioned in float32, unlike those of the base."""
    powers = np.arange(0, head_dim, 2, dtype=np.float64) / (head_dim - 2)
    return _base(rope.theta, head_dim) * growth**-powers


def _ntk(rope: RopeConfig, head_dim: int) -> Any:
    """Return NTK-aware frequencies (section 3.1, definition 1)."""
    return _with_larger_base(rope, head_dim, rope.factor)


def _dynamic(rope: RopeConfig, head_dim: int, length: Length) -> Any:
    """Return NTK-aware frequencies whose base grows with a length above the original one."""
    growth = rope.factor * _relative_length(rope, length) - (rope.factor - 1)
    return _with_larger_base(rope, head_dim, growth)


def _relative_length(rope: RopeConfig, length: Length) -> Any:
    """Return the length divided by the original one, at least 1."""
    return _numpy_of(length).maximum(length / _original(rope), 1.0)


def _interpolated(frequencies: np.ndarray, factor: Any, ramp: np.ndarray) -> Any:
    """Return frequencies that are divided by `factor` where the ramp is 1."""
    return frequencies * (1 - ramp) + frequencies / factor * ramp


def _index_ramp(rope: RopeConfig, head_dim: int) -> np.ndarray:
    """Return the ramp of the published code, linear in the index of a pair of dimensions: from 0
    (`beta_fast` rotations) to 1 (`beta_slow`)."""
    original = _original(rope)

    def dimension_of(rotations: float) -> float:
        log = math.log(original / (rotations * 2 * math.pi))
        return head_dim * log / (2 * math.log(rope.theta))

    low, high = dimension_of(rope.beta_fast), dimension_of(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    high = high + 0.001 if low == high else high
    return np.clip((np.arange(head_dim // 2) - low) / (high - low), 0, 1)


def _rotation_ramp(rope: RopeConfig, head_dim: int, slow: float, fast: float) -> np.ndarray:
    """Return a ramp linear in the rotations over the original length: from 1 (`slow`) to 0
    (`fast`)."""
    rotations = _original(rope) * _base(rope.theta, head_dim) / (2 * math.pi)
    return np.clip((fast - rotations) / (fast - slow), 0, 1)


def _by_parts_code(rope: RopeConfig, head_dim: int) -> Any:
    """Return NTK-by-parts frequencies with the ramp of the published code."""
    ramp = _index_ramp(rope, head_dim)
    return _interpolated(_base(rope.theta, head_dim), rope.factor, ramp)


def _by_parts_paper(rope: RopeConfig, head_dim: int) -> Any:
    """Return NTK-by-parts frequencies with the ramp of the paper (section 3.2, definition 2)."""
    ramp = _rotation_ramp(rope, head_dim, rope.beta_slow, rope.beta_fast)
    return _interpolated(_base(rope.theta, head_dim), rope.factor, ramp)


def _llama3(rope: RopeConfig, head_dim: int) -> Any:
    """Return the frequencies of Llama 3.1: the paper's ramp between other rotations."""
    ramp = _rotation_ramp(rope, head_dim, rope.low_freq_factor, rope.high_freq_factor)
    return _interpolated(_base(rope.theta, head_dim), rope.factor, ramp)


def _dynamic_yarn_factor(rope: RopeConfig, length: Length) -> Any:
    relative = _relative_length(rope, length)
    return _numpy_of(length).maximum(relative, rope.factor)


def _dynamic_yarn(rope: RopeConfig, head_dim: int, length: Length) -> Any:
    """Return YaRN frequencies for the factor that the length needs (section 3.3)."""
    factor, ramp = _dynamic_yarn_factor(rope, length), _index_ramp(rope, head_dim)
    return _interpolated(_base(rope.theta, head_dim), factor, ramp)


def _longrope(rope: RopeConfig, head_dim: int, length: Length) -> Any:
    """Return frequencies divided by the factors for short or for long documents."""
    check_rotary_dim(rope, head_dim)
    base, is_long = _base(rope.theta, head_dim), length > _original(rope)
    short, long = base / np.array(rope.short_factor), base / np.array(rope.long_factor)
    return _numpy_of(length).where(is_long, long, short)


def _yarn_attention(rope: RopeConfig) -> float:
    """Return 0.1 ln(factor) + 1, by which YaRN scales queries and keys (equation 22)."""
    if rope.attention_factor is not None:
        return rope.attention_factor
    return 0.1 * math.log(rope.factor) + 1.0


def _dynamic_yarn_attention(rope: RopeConfig, length: Length) -> Any:
    log = _numpy_of(length).log
    return 0.1 * log(_dynamic_yarn_factor(rope, length)) + 1.0


def _longrope_attention(rope: RopeConfig, length: Length) -> float:
    """Return sqrt(1 + ln(factor) / ln(original length)), at all lengths."""
    del length
    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.factor == 1:
        return 1.0
    return math.sqrt(1 + math.log(rope.factor) / math.log(_original(rope)))


_PARTS = ("factor", "original_max_positions", "beta_fast", "beta_slow")

SCALINGS: dict[str, Scaling] = {
    "default": Scaling(_default, in_transformers=True),
    "linear": Scaling(_linear, ("factor",), in_transformers=True),
    "ntk": Scaling(_ntk, ("factor",)),
    "ntk_by_parts_paper": Scaling(_by_parts_paper, _PARTS, reaches_factor=True),
    "ntk_by_parts_code": Scaling(_by_parts_code, (*_PARTS, "truncate"), reaches_factor=True),
    "yarn": Scaling(
        _by_parts_code,
        (*_PARTS, "truncate", "attention_factor"),
        _yarn_attention,
        reaches_factor=True,
        in_transformers=True,
    ),
    "yarn_paper": Scaling(
        _by_parts_paper, (*_PARTS, "attention_factor"), _yarn_attention, reaches_factor=True
    ),
    "dynamic": Scaling(
        _dynamic,
        ("factor", "original_max_positions"),
        by_length=True,
        unlimited=True,
        in_transformers=True,
    ),
    "dynamic_yarn": Scaling(
        _dynamic_yarn,
        (*_PARTS, "truncate"),
        _dynamic_yarn_attention,
        by_length=True,
        unlimited=True,
    ),
    "llama3": Scaling(
        _llama3,
        ("factor", "original_max_positions", "low_freq_factor", "high_freq_factor"),
        in_transformers=True,
    ),
    "longrope": Scaling(
        _longrope,
        ("factor", "original_max_positions", "attention_factor", "short_factor", "long_factor"),
        _longrope_attention,
        by_length=True,
        in_transformers=True,
    ),
}

EXTENSIONS = tuple(name for name in SCALINGS if name != "longrope")
"""Scalings that a factor and the first length determine."""


def inverse_frequencies(rope: RopeConfig, head_dim: int, length: Length) -> Any:
    """Return radians per position `[head_dim / 2]` in a document of `length` tokens.

    They are float64 for an `int`, and float32 for a traced length.
    """
    frequencies = rope.scaling.frequencies
    return frequencies(rope, head_dim, *([length] if rope.scaling.by_length else []))


def attention_scaling(rope: RopeConfig, length: Length) -> Any:
    """Return the factor of cosines and sines in a document of `length` tokens."""
    attention = rope.scaling.attention
    if attention is None:
        return 1.0
    return attention(rope, *([length] if rope.scaling.by_length else []))


def check_rotary_dim(rope: RopeConfig, rotary_dim: int) -> None:
    """Raise `UserError` if `longrope` has not one factor for each pair of rotated dimensions."""
    for name in ("short_factor", "long_factor"):
        number = len(getattr(rope, name))
        if rope.type == "longrope" and number != rotary_dim // 2:
            raise UserError(
                f"rope type 'longrope': {name} has {number} numbers; "
                f"accepted: {rotary_dim // 2}, one for each pair of rotated dimensions"
            )


def as_longrope(rope: RopeConfig, head_dim: int, max_positions: int) -> RopeConfig:
    """Return `longrope` with the frequencies of another type, which transformers can read.

    Raises `UserError` for a type whose frequencies depend on the length in another way.
    """
    if rope.scaling.by_length:
        raise UserError(f"rope type {rope.type!r} cannot be expressed by longrope factors")
    divisors = _base(rope.theta, head_dim) / inverse_frequencies(rope, head_dim, 1)
    return RopeConfig(
        rope.theta,
        "longrope",
        original_max_positions=rope.original_max_positions or max_positions,
        attention_factor=attention_scaling(rope, 1),
        short_factor=tuple(divisors.tolist()),
        long_factor=tuple(divisors.tolist()),
    )


def document_lengths(
    segment_ids: Int[Array, "B T"], positions: Int[Array, "B T"]
) -> Int[Array, "B T"]:
    """Return the length of each token's document: its largest position plus 1."""
    same = segment_ids[:, :, None] == segment_ids[:, None, :]
    return jnp.max(jnp.where(same, positions[:, None, :], 0), axis=-1) + 1


def rotary_tables(
    rope: RopeConfig,
    head_dim: int,
    positions: Int[Array, "B T"],
    lengths: Int[Array, "B T"] | None = None,
) -> tuple[Float[Array, "B T half"], Float[Array, "B T half"]]:
    """Return float32 (cos, sin). `lengths` (default: every row is one document) are those of each
    token's document."""
    if not rope.scaling.by_length:
        frequencies = jnp.asarray(inverse_frequencies(rope, head_dim, 1), jnp.float32)[None, None]
        angles, scale = positions[..., None] * frequencies, attention_scaling(rope, 1)
        return jnp.cos(angles) * scale, jnp.sin(angles) * scale
    if lengths is None:
        lengths = jnp.broadcast_to(positions.max(-1, keepdims=True) + 1, positions.shape)
    frequencies, scale = scaled_by_length(rope, head_dim, lengths)
    angles = positions[..., None] * frequencies
    return jnp.cos(angles) * scale[..., None], jnp.sin(angles) * scale[..., None]


def scaled_by_length(
    rope: RopeConfig, head_dim: int, lengths: Int[Array, "..."]
) -> tuple[Float[Array, "... half"], Float[Array, "..."]]:
    """Return float32 (frequencies, factors of cosines and sines) of documents by their lengths."""

    def scaled(length: Array) -> tuple[Array, Array]:
        frequencies = inverse_frequencies(rope, head_dim, length)
        return frequencies, jnp.asarray(attention_scaling(rope, length), jnp.float32)

    return functools.reduce(lambda function, _: jax.vmap(function), lengths.shape, scaled)(lengths)


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
