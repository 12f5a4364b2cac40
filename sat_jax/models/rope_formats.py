"""Rotary embeddings in config.json, in the forms of transformers 4 and 5, and in GGUF metadata.

transformers 4 has a field for the base and `rope_scaling`, transformers 5 has `rope_parameters` and
reads the others too. Written files have the fields of transformers 4.
"""

import contextlib
import json
import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from sat_jax.errors import UserError
from sat_jax.models.format_fields import GgufFields, Json, JsonFields
from sat_jax.nn.rope import (
    SCALINGS,
    RopeConfig,
    attention_scaling,
    check_rotary_dim,
    inverse_frequencies,
)

_ORIGINAL = "original_max_position_embeddings"
_JSON_NAMES = {"original_max_positions": _ORIGINAL}
_NUMBERS = (
    *("factor", "attention_factor", "beta_fast", "beta_slow"),
    *("low_freq_factor", "high_freq_factor"),
)
_LISTS = ("short_factor", "long_factor")

# A GGUF tensor: the divisor of each rotary frequency.
ROPE_FREQS = "rope_freqs.weight"
ROPE_KEYS = frozenset(
    [
        "rope.dimension_count",
        "rope.freq_base",
        "rope.scaling.type",
        "rope.scaling.factor",
        "rope.scaling.original_context_length",
        "rope.scaling.attn_factor",
        "rope.scaling.yarn_beta_fast",
        "rope.scaling.yarn_beta_slow",
        "rope.scaling.finetuned",
    ]
)
ROPE_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "rope.scaling.yarn_attn_factor": (1.0,),
    "rope.scaling.yarn_ext_factor": (1.0,),
}


def rope_from_json(
    fields: JsonFields,
    max_positions: int,
    rotary_dim: int,
    *,
    base: str = "rope_theta",
    rotary_fraction: float = 1.0,
) -> RopeConfig:
    """Return the RoPE of a config.json. If a file has several forms, they must agree.

    `rotary_dim` dimensions of a head are rotated. `base` is the field of the base beside
    `rope_scaling`. Raises `UserError` if a form rotates another fraction of a head than
    `rotary_fraction`.
    """
    theta = fields.number(base, 10_000.0)
    forms = set()
    for field in ("rope_parameters", "rope_scaling"):
        if (nested := nested_fields(fields, field)) is not None:
            if nested.raw.get("partial_rotary_factor") not in (rotary_fraction, None):
                raise nested.refuse("partial_rotary_factor", str(rotary_fraction))
            rope = _rope_config(nested.where, **_settings(nested, fields, theta, max_positions))
            with _located(nested.where):
                check_rotary_dim(rope, rotary_dim)
            forms.add(rope)
    if len(forms) > 1:
        raise UserError(
            f"{fields.where}: rope_parameters and rope_scaling differ; keep one of them"
        )
    rope = next(iter(forms), RopeConfig(theta))
    fields.check_equal({base: rope.theta, "rope_theta": rope.theta})
    return rope


def nested_fields(fields: JsonFields, field: str) -> JsonFields | None:
    """Return the object in `field`, or None if it is missing or null."""
    raw, where = fields.raw.get(field), f"{fields.where}: {field}"
    if raw is None:
        return None
    if not isinstance(raw, dict):
        raise UserError(f"{where}: expected an object, found {json.dumps(raw)}")
    if any(isinstance(value, dict) for value in raw.values()):
        raise UserError(f"{where}: RoPE that differs between layers is not supported")
    return JsonFields(raw, where)


def _settings(
    fields: JsonFields, outer: JsonFields, theta: float, max_positions: int
) -> dict[str, Any]:
    """Return the arguments of `RopeConfig` from `rope_scaling` or `rope_parameters`, which is in
    the file `outer`."""
    kind: Any = fields.raw.get("rope_type", fields.raw.get("type", "default"))
    fields.check_equal({"type": kind})
    if not isinstance(kind, str) or kind not in SCALINGS:
        raise UserError(
            f"{fields.where}: rope type {json.dumps(kind)} is not supported; "
            f"accepted: {', '.join(SCALINGS)}"
        )
    settings: dict[str, Any] = {"type": kind, "theta": fields.number("rope_theta", theta)}
    present = {name for name, value in fields.raw.items() if value is not None}
    settings |= {name: fields.number(name) for name in _NUMBERS if name in present}
    settings |= {name: fields.numbers(name) for name in _LISTS if name in present}
    settings["truncate"] = fields.flag("truncate", True)
    if kind == "llama3":
        for name in ("low_freq_factor", "high_freq_factor"):
            settings[name] = fields.number(name)
    accepted = SCALINGS[kind].fields
    if "original_max_positions" in accepted:
        original = _original_length(fields, outer, kind, max_positions)
        settings["original_max_positions"] = original
        quotient = max_positions / original
        if kind in ("yarn", "longrope"):
            settings.setdefault("factor", quotient)
        if kind == "longrope" and _ORIGINAL in outer.raw and "attention_factor" not in settings:
            # transformers 4 then replaces the factor by the quotient, transformers 5 does not.
            fields.check_equal({"factor": quotient})
    if "factor" in accepted and "factor" not in settings:
        settings["factor"] = fields.number("factor")
    if {"mscale", "mscale_all_dim"} & present:
        if kind != "yarn":
            raise UserError(f"{fields.where}: mscale is no field of rope type {kind!r}")
        if settings.get("attention_factor") is None:
            settings["attention_factor"] = _quotient_of_mscale(fields, settings["factor"])
    return settings


def _original_length(fields: JsonFields, outer: JsonFields, kind: str, max_positions: int) -> int:
    """Return the trained length, from beside or within `rope_scaling`."""
    default = None
    if outer.raw.get(_ORIGINAL) is not None:
        default = outer.count(_ORIGINAL)
        fields.check_equal({_ORIGINAL: default})
    if kind == "dynamic":
        # transformers uses max_position_embeddings only.
        if fields.count(_ORIGINAL, default or max_positions) != max_positions:
            raise fields.refuse(_ORIGINAL, "max_position_embeddings")
        return max_positions
    if kind == "yarn" and fields.raw.get("factor") is not None:
        default = default or max_positions
    return fields.count(_ORIGINAL, default)


def _quotient_of_mscale(fields: JsonFields, factor: float) -> float | None:
    """Return the attention factor from the two `mscale` fields (in DeepSeek's files), or None if
    one is missing."""
    if not (fields.raw.get("mscale") and fields.raw.get("mscale_all_dim")):
        return None
    mscale, all_dim = fields.number("mscale"), fields.number("mscale_all_dim")
    return (0.1 * mscale * math.log(factor) + 1) / (0.1 * all_dim * math.log(factor) + 1)


def _rope_config(where: str, **settings: Any) -> RopeConfig:
    """Return the configuration; errors name the file."""
    with _located(where):
        return RopeConfig(**settings)


@contextlib.contextmanager
def _located(where: str) -> Iterator[None]:
    """Put the name of the file before an error."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


def rope_to_json(rope: RopeConfig, max_positions: int) -> Json:
    """Return the fields of a config.json without the base: `rope_scaling` and, with `longrope`, the
    original length.

    transformers 4 reads the original length of `longrope` only there, and then replaces the factor
    by the quotient of the lengths.
    """
    if rope.type == "dynamic" and rope.original_max_positions != max_positions:
        raise UserError(
            f"a Hugging Face directory cannot hold dynamic RoPE with original_max_positions "
            f"{rope.original_max_positions} other than max_positions {max_positions}"
        )
    if rope.type == "default":
        return {"rope_scaling": None}
    raw: Json = {"rope_type": rope.type}
    raw |= {_JSON_NAMES.get(name, name): getattr(rope, name) for name in rope.scaling.fields}
    if rope.type == "dynamic":
        del raw[_ORIGINAL]
    if rope.type != "longrope":
        return {"rope_scaling": {name: value for name, value in raw.items() if value is not None}}
    raw |= {name: list(raw[name]) for name in _LISTS}
    if raw["factor"] * raw[_ORIGINAL] != max_positions:
        raw["attention_factor"] = attention_scaling(rope, 1)
    return {"rope_scaling": raw, _ORIGINAL: rope.original_max_positions}


def not_exportable(rope: RopeConfig) -> UserError:
    """Return the error that refuses a type that transformers does not have."""
    offer = "" if rope.scaling.by_length else " (its frequencies can be written as longrope)"
    accepted = ", ".join(name for name, scaling in SCALINGS.items() if scaling.in_transformers)
    return UserError(f"transformers has no rope type {rope.type!r}{offer}; accepted: {accepted}")


def rope_from_gguf(fields: GgufFields, rotary_dim: int, max_positions: int) -> RopeConfig:
    """Return the RoPE of a GGUF file, from its keys and its tensor of frequency divisors.

    `rotary_dim` is the number of rotated dimensions of a head.
    """
    theta = fields.number("rope.freq_base", 10_000.0)
    kind = fields.metadata.get("rope.scaling.type", "none")
    if ROPE_FREQS in fields.shapes:
        if kind not in ("none", "linear") or fields.number("rope.scaling.factor", 1.0) != 1.0:
            raise UserError(f"{fields.where}: {ROPE_FREQS} beside {kind} RoPE is not supported")
        return _rope_from_divisors(theta, rotary_dim, fields)
    match kind:
        case "none":
            return RopeConfig(theta)
        case "linear":
            factor = fields.number("rope.scaling.factor")
            return _rope_config(fields.where, theta=theta, type="linear", factor=factor)
        case "yarn":
            factor = fields.number("rope.scaling.factor")
            # GGUF has a multiple of the scaling of YaRN.
            multiple = fields.number("rope.scaling.attn_factor", 1.0)
            return _rope_config(
                fields.where,
                theta=theta,
                type="yarn",
                factor=factor,
                original_max_positions=fields.count(
                    "rope.scaling.original_context_length", max_positions
                ),
                beta_fast=fields.number("rope.scaling.yarn_beta_fast", 32.0),
                beta_slow=fields.number("rope.scaling.yarn_beta_slow", 1.0),
                attention_factor=None
                if multiple == 1.0
                else multiple * (0.1 * math.log(factor) + 1.0),
            )
        case _:
            raise fields.refuse("rope.scaling.type", "none, linear or yarn")


def _rope_from_divisors(theta: float, rotary_dim: int, fields: GgufFields) -> RopeConfig:
    """Return the `llama3` rule whose divisors the file has: low 1, high 4, original length 2^n.

    All published models with this tensor follow that rule, with length 8,192.
    """
    divisors = fields.fetch(ROPE_FREQS).reshape(-1)
    default = RopeConfig(theta)
    candidates = [default] + [
        RopeConfig(theta, "llama3", float(divisors.max()), 2**n) for n in range(5, 21)
    ]
    plain = inverse_frequencies(default, rotary_dim, 1)
    for rope in candidates:
        expected = plain / inverse_frequencies(rope, rotary_dim, 1)
        if expected.shape == divisors.shape and np.allclose(expected, divisors, rtol=1e-4, atol=0):
            return rope
    raise UserError(
        f"{fields.where}: {ROPE_FREQS} does not follow the llama3 rule; no other is supported"
    )


def rope_to_gguf(rope: RopeConfig, rotary_dim: int) -> Json:
    """Return the metadata of a RoPE, without the architecture's prefix.

    `llama3` also needs the tensor of `rope_divisors`. Raises `UserError` for a type that GGUF does
    not have.
    """
    keys: Json = {"rope.dimension_count": rotary_dim, "rope.freq_base": rope.theta}
    match rope.type:
        case "default" | "llama3":
            return keys
        case "linear":
            return keys | {"rope.scaling.type": "linear", "rope.scaling.factor": rope.factor}
        case "yarn":
            keys |= {
                "rope.scaling.type": "yarn",
                "rope.scaling.factor": rope.factor,
                "rope.scaling.original_context_length": rope.original_max_positions,
                "rope.scaling.yarn_beta_fast": rope.beta_fast,
                "rope.scaling.yarn_beta_slow": rope.beta_slow,
            }
            if rope.attention_factor is not None:
                multiple = rope.attention_factor / (0.1 * math.log(rope.factor) + 1.0)
                keys["rope.scaling.attn_factor"] = multiple
            return keys
        case _:
            raise UserError(
                f"GGUF has no rope type {rope.type!r}; accepted: default, linear, yarn, llama3"
            )


def rope_divisors(rope: RopeConfig, rotary_dim: int) -> np.ndarray | None:
    """Return the tensor `ROPE_FREQS` `[rotary_dim / 2]` of `llama3`, None for another type."""
    if rope.type != "llama3":
        return None
    plain = inverse_frequencies(RopeConfig(rope.theta), rotary_dim, 1)
    return np.asarray(plain / inverse_frequencies(rope, rotary_dim, 1), np.float32)


def same_in_gguf(rope: RopeConfig, other: RopeConfig, rotary_dim: int) -> bool:
    """Return whether two RoPEs that GGUF can store are equal up to the rounding of a file."""
    frequencies, others = (inverse_frequencies(r, rotary_dim, 1) for r in (rope, other))
    scale, other_scale = (attention_scaling(r, 1) for r in (rope, other))
    return (
        rope.type == other.type
        and np.allclose(frequencies, others, rtol=1e-4, atol=0)
        and math.isclose(scale, other_scale, rel_tol=1e-6)
    )
