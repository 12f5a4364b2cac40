"""Rotary embeddings in config.json, in the forms of transformers 4 and 5, and in GGUF metadata.

transformers 4 has a field for the base and `rope_scaling`, transformers 5 has `rope_parameters` and
reads the others too. Written files have the fields of transformers 4.
"""

import json
import math
from typing import Any, get_args

import numpy as np

from sat_jax.errors import UserError
from sat_jax.models.format_fields import GgufFields, Json, JsonFields
from sat_jax.nn.rope import RopeConfig, RopeType, inverse_frequencies

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
    fields: JsonFields, max_positions: int, base: str = "rope_theta", rotary_fraction: float = 1.0
) -> RopeConfig:
    """Return the RoPE of a config.json. If a file has several forms, they must agree.

    `base` is the field of the base beside `rope_scaling`. Raises `UserError` if a form rotates
    another fraction of a head than `rotary_fraction`.
    """
    theta = fields.number(base, 10_000.0)
    forms = {
        _rope_from(nested, theta, max_positions, rotary_fraction)
        for field in ("rope_parameters", "rope_scaling")
        if (nested := nested_fields(fields, field)) is not None
    }
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


def _rope_from(
    fields: JsonFields, theta: float, max_positions: int, rotary_fraction: float
) -> RopeConfig:
    if fields.raw.get("partial_rotary_factor") not in (rotary_fraction, None):
        raise fields.refuse("partial_rotary_factor", str(rotary_fraction))
    kind: Any = fields.raw.get("rope_type", fields.raw.get("type", "default"))
    fields.check_equal({"type": kind})
    if kind not in get_args(RopeType):
        raise UserError(
            f"{fields.where}: rope type {json.dumps(kind)} is not supported; accepted: "
            + ", ".join(get_args(RopeType))
        )
    theta = fields.number("rope_theta", theta)
    if kind == "default":
        return RopeConfig(theta)
    factor = fields.number("factor")
    match kind:
        case "linear":
            return RopeConfig(theta, kind, factor)
        case "dynamic":
            # transformers uses max_position_embeddings only.
            if fields.count("original_max_position_embeddings", max_positions) != max_positions:
                raise fields.refuse("original_max_position_embeddings", "max_position_embeddings")
            return RopeConfig(theta, kind, factor, max_positions)
        case "yarn":
            return RopeConfig(
                theta,
                kind,
                factor,
                fields.count("original_max_position_embeddings", max_positions),
                beta_fast=fields.number("beta_fast", 32.0),
                beta_slow=fields.number("beta_slow", 1.0),
                truncate=fields.flag("truncate", True),
                attention_factor=_yarn_attention_factor(fields, factor),
            )
        case _:
            low = fields.number("low_freq_factor")
            return RopeConfig(
                theta,
                kind,
                factor,
                fields.count("original_max_position_embeddings"),
                low_freq_factor=low,
                high_freq_factor=fields.number("high_freq_factor", above=low),
            )


def _yarn_attention_factor(fields: JsonFields, factor: float) -> float | None:
    """Return the explicit factor, or the quotient of the two `mscale` fields, or None."""
    if fields.raw.get("attention_factor") is not None:
        return fields.number("attention_factor")
    if not (fields.raw.get("mscale") and fields.raw.get("mscale_all_dim")) or factor <= 1:
        return None
    mscale, all_dim = fields.number("mscale"), fields.number("mscale_all_dim")
    return (0.1 * mscale * math.log(factor) + 1) / (0.1 * all_dim * math.log(factor) + 1)


def rope_to_json(rope: RopeConfig, max_positions: int) -> Json:
    """Return `rope_scaling` of a config.json, which does not have the base."""
    raw: Json = {"rope_type": rope.type}
    if rope.type != "default":
        raw["factor"] = rope.factor
    if rope.type == "dynamic" and rope.original_max_positions != max_positions:
        raise UserError(
            f"a Hugging Face directory cannot hold dynamic RoPE with original_max_positions "
            f"{rope.original_max_positions} other than max_positions {max_positions}"
        )
    if rope.type in ("yarn", "llama3"):
        raw["original_max_position_embeddings"] = rope.original_max_positions
    if rope.type == "llama3":
        raw |= {"low_freq_factor": rope.low_freq_factor, "high_freq_factor": rope.high_freq_factor}
    if rope.type == "yarn":
        raw |= {"beta_fast": rope.beta_fast, "beta_slow": rope.beta_slow}
        raw["truncate"] = rope.truncate
        if rope.attention_factor is not None:
            raw["attention_factor"] = rope.attention_factor
    return {"rope_scaling": None if rope.type == "default" else raw}


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
            return RopeConfig(theta, "linear", fields.number("rope.scaling.factor"))
        case "yarn":
            factor = fields.number("rope.scaling.factor")
            # GGUF has a multiple of the scaling of YaRN.
            multiple = fields.number("rope.scaling.attn_factor", 1.0)
            return RopeConfig(
                theta,
                "yarn",
                factor,
                fields.count("rope.scaling.original_context_length", max_positions),
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
