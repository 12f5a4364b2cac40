"""config.json of Hugging Face directories ↔ `LlamaConfig`, in the old and the new form.

Old (transformers 4): `rope_theta`, `rope_scaling`, `torch_dtype`; new (transformers 5):
`rope_parameters`, `dtype`. What is written carries both and either version reads the same model
from it. A field that changes the function and is not implemented is refused by name.
"""

import json
import math
from pathlib import Path
from typing import Any, get_args

from sat_jax.errors import UserError
from sat_jax.models.llama_config import Family, LlamaConfig
from sat_jax.nn.rope import RopeConfig, RopeType

Json = dict[str, Any]

_ARCHITECTURES: dict[Family, str] = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}

# Whether a family has biases on q, k and v, and norms on q and k.
_FLAGS: dict[Family, tuple[bool, bool]] = {
    "llama": (False, False),
    "mistral": (False, False),
    "qwen2": (True, False),
    "qwen3": (False, True),
}

# Fields that would change the function, with the values that do not.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "attention_out_bias": (False, None),
    "partial_rotary_factor": (1.0, None),
    "rope_interleaved": (False, None),
    "use_mrope": (False, None),
    "original_max_position_embeddings": (None,),
    "no_rope_layers": (None,),
    "is_encoder_decoder": (False, None),
    "use_parallel_residual": (False, None),
    "alibi": (False, None),
    "use_qk_norm": (False, None),
    "qk_layernorm": (False, None),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "clip_qkv": (None,),
    "attention_multiplier": (None,),
    "embedding_multiplier": (1.0, None),
    "residual_multiplier": (1.0, None),
    "logits_scaling": (1.0, None),
    "logit_scale": (1.0, None),
    "num_experts": (0, None),
    "num_local_experts": (0, None),
    "quantization_config": (None,),
    "compression_config": (None,),
    "auto_map": (None,),
}


def read_json(path: Path) -> Json:
    """The JSON object in a file; broken or missing is one line."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


class _Fields:
    """Typed access to a JSON object; every error names the file and the field."""

    def __init__(self, raw: Json, where: str):
        self.raw, self.where = raw, where

    def refuse(self, field: str, accepted: str) -> UserError:
        value = json.dumps(self.raw.get(field))
        return UserError(f"{self.where}: {field} = {value} is not supported; accepted: {accepted}")

    def count(self, field: str, default: int | None = None) -> int:
        """A positive whole number; `default` stands for a missing or null field."""
        value = self.raw.get(field)
        if value is None and default is not None:
            return default
        if type(value) is not int or value < 1:
            raise self.refuse(field, "a positive whole number")
        return value

    def number(self, field: str, default: float | None = None, above: float = 0.0) -> float:
        """A finite number greater than `above`; `default` stands for a missing or null field."""
        value: Any = self.raw.get(field)
        if value is None and default is not None:
            return default
        if type(value) not in (int, float) or not math.isfinite(value) or value <= above:
            raise self.refuse(field, f"a number above {above:g}")
        return float(value)

    def flag(self, field: str, default: bool) -> bool:
        value = self.raw.get(field)
        if value is not None and type(value) is not bool:
            raise self.refuse(field, "true or false")
        return default if value is None else value

    def token_ids(self, field: str) -> tuple[int, ...]:
        """A token id, a list of them, or null."""
        value = self.raw.get(field)
        ids = [] if value is None else value if isinstance(value, list) else [value]
        if any(type(i) is not int for i in ids):
            raise self.refuse(field, "a token id, a list of token ids or null")
        return tuple(ids)


def config_from_json(raw: Json, where: str) -> LlamaConfig:
    """The model that a config.json describes; `where` names the file in errors."""
    fields = _Fields(raw, where)
    family: Any = raw.get("model_type")
    if not isinstance(family, str) or family not in _ARCHITECTURES:
        raise fields.refuse("model_type", ", ".join(_ARCHITECTURES))
    if raw.get("architectures") not in (None, [_ARCHITECTURES[family]]):
        raise fields.refuse("architectures", _ARCHITECTURES[family])
    for field, neutral in _NEUTRAL.items():
        if field in raw and raw[field] not in neutral:
            raise fields.refuse(field, " or ".join(json.dumps(value) for value in neutral))

    n_heads = fields.count("num_attention_heads")
    d_model = fields.count("hidden_size")
    # Only old Llama files lack the number of KV heads; the other families' default is not H.
    n_kv_heads = fields.count("num_key_value_heads", n_heads if family == "llama" else None)
    if n_heads % n_kv_heads:
        raise fields.refuse("num_key_value_heads", f"a divisor of num_attention_heads = {n_heads}")
    if raw.get("head_dim") is None and d_model % n_heads:
        raise fields.refuse(
            "head_dim", "a size, as num_attention_heads does not divide hidden_size"
        )
    # Qwen3's head size is a number of its own that never follows from the others.
    head_dim = fields.count("head_dim", None if family == "qwen3" else d_model // n_heads)
    if head_dim % 2:
        raise fields.refuse("head_dim", "an even number")
    n_layers = fields.count("num_hidden_layers")
    max_positions = fields.count("max_position_embeddings")
    _refuse_sliding_window(fields, family, n_layers, max_positions)
    bos = fields.token_ids("bos_token_id")
    qkv_bias, qk_norm = _FLAGS[family]
    return LlamaConfig(
        vocab_size=fields.count("vocab_size"),
        d_model=d_model,
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=head_dim,
        d_ff=fields.count("intermediate_size"),
        max_positions=max_positions,
        rope=_rope(raw, max_positions, where),
        norm_eps=fields.number("rms_norm_eps"),
        tie_embeddings=fields.flag("tie_word_embeddings", False),
        qkv_bias=qkv_bias,
        qk_norm=qk_norm,
        family=family,
        bos_token_id=bos[0] if bos else None,
        eos_token_ids=fields.token_ids("eos_token_id"),
    )


def _refuse_sliding_window(
    fields: _Fields, family: Family, n_layers: int, max_positions: int
) -> None:
    """A window is harmless where no layer uses it, or where it is as long as any text may be."""
    layer_types = fields.raw.get("layer_types")
    if layer_types is not None and layer_types != ["full_attention"] * len(layer_types):
        raise fields.refuse("layer_types", '"full_attention" for every layer')
    window = fields.raw.get("sliding_window")
    if window is None or (type(window) is int and window >= max_positions):
        return
    if family in ("qwen2", "qwen3"):
        # The first `max_window_layers` layers of these families attend in full.
        full = layer_types is not None or fields.count("max_window_layers", 28) >= n_layers
        if not fields.flag("use_sliding_window", False) or full:
            return
    raise fields.refuse("sliding_window", "null, or no less than max_position_embeddings")


def _rope(raw: Json, max_positions: int, where: str) -> RopeConfig:
    """RoPE from either form. Where a file carries both, they must mean the same."""
    theta = _Fields(raw, where).number("rope_theta", 10_000.0)
    found = {
        field: _rope_from(raw[field], theta, max_positions, f"{where}: {field}")
        for field in ("rope_parameters", "rope_scaling")
        if raw.get(field) is not None
    }
    if len(set(found.values())) > 1:
        raise UserError(f"{where}: rope_parameters and rope_scaling differ; keep one of them")
    return next(iter(found.values()), RopeConfig(theta))


def _rope_from(raw: Any, theta: float, max_positions: int, where: str) -> RopeConfig:
    if not isinstance(raw, dict):
        raise UserError(f"{where}: expected an object, found {json.dumps(raw)}")
    fields = _Fields(raw, where)
    if any(isinstance(value, dict) for value in raw.values()):
        raise UserError(f"{where}: RoPE that differs between layers is not supported")
    if raw.get("partial_rotary_factor") not in (1.0, None):
        raise fields.refuse("partial_rotary_factor", "1.0")
    kind: Any = raw.get("rope_type", raw.get("type", "default"))
    if kind not in get_args(RopeType):
        raise UserError(
            f"{where}: rope type {json.dumps(kind)} is not supported; accepted: "
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
            # transformers measures growth from max_position_embeddings and nothing else.
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


def _yarn_attention_factor(fields: _Fields, factor: float) -> float | None:
    """The explicit factor, or the quotient that the `mscale` pair stands for, or None."""
    if fields.raw.get("attention_factor") is not None:
        return fields.number("attention_factor")
    if not (fields.raw.get("mscale") and fields.raw.get("mscale_all_dim")) or factor <= 1:
        return None
    mscale, all_dim = fields.number("mscale"), fields.number("mscale_all_dim")
    return (0.1 * mscale * math.log(factor) + 1) / (0.1 * all_dim * math.log(factor) + 1)


def config_to_json(config: LlamaConfig, dtype: str) -> Json:
    """The config.json of `config` with weights in `dtype`, for transformers 4 and 5 alike."""
    if (config.qkv_bias, config.qk_norm) != _FLAGS[config.family]:
        raise UserError(
            f"no {_ARCHITECTURES[config.family]} has qkv_bias={config.qkv_bias} and "
            f"qk_norm={config.qk_norm}; the model cannot be written as a Hugging Face directory"
        )
    rope = _rope_to_json(config)
    eos = config.eos_token_ids
    raw: Json = {
        "architectures": [_ARCHITECTURES[config.family]],
        "model_type": config.family,
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "intermediate_size": config.d_ff,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_positions,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "attention_dropout": 0.0,
        "rope_theta": config.rope.theta,
        "rope_scaling": None if config.rope.type == "default" else rope,
        "rope_parameters": {"rope_theta": config.rope.theta, **rope},
        "bos_token_id": config.bos_token_id,
        "eos_token_id": list(eos) if len(eos) > 1 else eos[0] if eos else None,
        "torch_dtype": dtype,
        "dtype": dtype,
        "use_cache": True,
    }
    if config.family == "llama":
        raw |= {"attention_bias": False, "mlp_bias": False}
    elif config.family == "mistral":
        raw |= {"sliding_window": None}
    else:
        raw |= {"use_sliding_window": False, "sliding_window": None}
        raw |= {"max_window_layers": config.n_layers}
    return raw


def _rope_to_json(config: LlamaConfig) -> Json:
    """The RoPE settings without theta, which the two forms keep in different places."""
    rope = config.rope
    raw: Json = {"rope_type": rope.type}
    if rope.type != "default":
        raw["factor"] = rope.factor
    if rope.type == "dynamic" and rope.original_max_positions != config.max_positions:
        raise UserError(
            f"a Hugging Face directory cannot hold dynamic RoPE with original_max_positions "
            f"{rope.original_max_positions} other than max_positions {config.max_positions}"
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
    return raw
