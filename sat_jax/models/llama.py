"""The Llama family: Llama, TinyLlama, SmolLM2, Mistral, Qwen2 (q/k/v bias), Qwen3 (q/k norm).

The `llama` architecture of GGUF, also used for Mistral, rotates adjacent dimensions, so that query
and key rows are stored in pairs. The Qwen architectures have the order of Hugging Face.
"""

import dataclasses
from typing import Any, Literal

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from sat_jax.errors import UserError
from sat_jax.models.decoder_config import DecoderConfig
from sat_jax.models.format_fields import (
    GGUF_KEYS,
    GGUF_NEUTRAL,
    JSON_NEUTRAL,
    GgufFields,
    Json,
    JsonFields,
    decoder_keys,
)
from sat_jax.models.formats import (
    GgufFormat,
    Layout,
    ModelFormat,
    Stored,
    Tensor,
    layer_paths,
    tensor,
)
from sat_jax.models.rope_formats import (
    ROPE_FREQS,
    ROPE_KEYS,
    ROPE_NEUTRAL,
    rope_from_gguf,
    rope_from_json,
    rope_to_gguf,
    rope_to_json,
)
from sat_jax.nn.attention.grouped_query import Attention
from sat_jax.nn.context import Context
from sat_jax.nn.decoder import Compute, Decoder
from sat_jax.nn.mlp import GatedMLP
from sat_jax.nn.norms import rms_norm
from sat_jax.nn.param import normal, param
from sat_jax.nn.rope import RopeConfig

Family = Literal["llama", "mistral", "qwen2", "qwen3"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LlamaConfig(DecoderConfig):
    """Sizes and options of a Llama model. `n_heads` is a multiple of `n_kv_heads`."""

    n_kv_heads: int
    head_dim: int
    rope: RopeConfig = RopeConfig()
    qkv_bias: bool = False
    qk_norm: bool = False
    family: Family = "llama"

    @property
    def query_heads(self) -> int:
        """Query heads in each KV group, G."""
        return self.n_heads // self.n_kv_heads

    @property
    def rotary_dim(self) -> int:
        """Rotated dimensions of a head: all."""
        return self.head_dim


class Block(nnx.Module):
    """All layers stacked: every parameter has a leading layer axis, `[L, ...]`."""

    def __init__(self, config: LlamaConfig, rngs: nnx.Rngs):
        layers, embed = config.n_layers, config.d_model
        out_scale = 0.02 / (2 * layers) ** 0.5
        self.attention_norm = param(jnp.ones, {"layer": layers, "norm": embed}, "vector")
        self.attention = Attention(
            layers=layers,
            kv_groups=config.n_kv_heads,
            query_heads=config.query_heads,
            head_dim=config.head_dim,
            embed=embed,
            out_scale=out_scale,
            bias=config.qkv_bias,
            norm=config.qk_norm,
            norm_eps=config.norm_eps,
            rngs=rngs,
        )
        self.mlp_norm = param(jnp.ones, {"layer": layers, "norm": embed}, "vector")
        self.mlp = GatedMLP(
            layers=layers, channels=config.d_ff, embed=embed, out_scale=out_scale, rngs=rngs
        )
        self.norm_eps = config.norm_eps

    def __call__(self, x: Float[Array, "B T D"], context: Context) -> Float[Array, "B T D"]:
        """Return the residual stream after one layer (without the L axis)."""
        x = x + self.attention(rms_norm(x, self.attention_norm, self.norm_eps), context)
        return x + self.mlp(rms_norm(x, self.mlp_norm, self.norm_eps), context)


class Llama(Decoder):
    """Token embedding, layers, RMS norm, and an output head that may be tied to the embedding."""

    def __init__(self, config: LlamaConfig, compute: Compute = Compute(), *, rngs: nnx.Rngs):
        self.config, self.compute = config, compute
        table = {"vocab": config.vocab_size, "embed": config.d_model}
        self.embed = param(normal(rngs, 0.02), table, "embedding")
        self.layers = Block(config, rngs)
        self.final_norm = param(jnp.ones, {"norm": config.d_model}, "vector")
        self.lm_head = nnx.data(None)
        if not config.tie_embeddings:
            self.lm_head = param(normal(rngs, 0.02), table, "embedding")

    def normalize(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Return the normed residual stream after the last layer."""
        return rms_norm(x, self.final_norm, self.config.norm_eps)


def _layer(
    path: str, huggingface: str, gguf: str, layout: Layout = "rows", rotary_pairs: bool = False
) -> Tensor:
    """Declare a tensor of each layer. `rotary_pairs`: see `Stored`; applies to GGUF only."""
    return Tensor(
        layer_paths(path),
        Stored(f"model.layers.{{layer}}.{huggingface}", layout),
        Stored(f"blk.{{layer}}.{gguf}", layout, rotary_pairs=rotary_pairs),
    )


def _tensors(rotary_pairs: bool) -> tuple[Tensor, ...]:
    return (
        tensor("embed", "model.embed_tokens.weight", "token_embd.weight"),
        tensor("final_norm", "model.norm.weight", "output_norm.weight", "vector"),
        tensor("lm_head", "lm_head.weight", "output.weight"),
        _layer("attention_norm", "input_layernorm.weight", "attn_norm.weight", "vector"),
        _layer("mlp_norm", "post_attention_layernorm.weight", "ffn_norm.weight", "vector"),
        _layer("attention/query", "self_attn.q_proj.weight", "attn_q.weight", "rows", rotary_pairs),
        _layer("attention/key", "self_attn.k_proj.weight", "attn_k.weight", "rows", rotary_pairs),
        _layer("attention/value", "self_attn.v_proj.weight", "attn_v.weight"),
        _layer("attention/output", "self_attn.o_proj.weight", "attn_output.weight", "columns"),
        _layer("attention/query_bias", "self_attn.q_proj.bias", "attn_q.bias", "vector"),
        _layer("attention/key_bias", "self_attn.k_proj.bias", "attn_k.bias", "vector"),
        _layer("attention/value_bias", "self_attn.v_proj.bias", "attn_v.bias", "vector"),
        _layer("attention/query_norm", "self_attn.q_norm.weight", "attn_q_norm.weight", "vector"),
        _layer("attention/key_norm", "self_attn.k_norm.weight", "attn_k_norm.weight", "vector"),
        _layer("mlp/gate", "mlp.gate_proj.weight", "ffn_gate.weight"),
        _layer("mlp/up", "mlp.up_proj.weight", "ffn_up.weight"),
        _layer("mlp/down", "mlp.down_proj.weight", "ffn_down.weight", "columns"),
    )


def _class_defaults(
    vocab_size: int,
    intermediate_size: int,
    num_key_value_heads: int | None,
    max_position_embeddings: int,
    bos_token_id: int | None,
    eos_token_id: int | None,
) -> dict[str, Any]:
    """Return the values of missing fields of a config.json; those that all model types share are
    not arguments."""
    return {
        "vocab_size": vocab_size,
        "hidden_size": 4096,
        "intermediate_size": intermediate_size,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": num_key_value_heads,
        "max_position_embeddings": max_position_embeddings,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "bos_token_id": bos_token_id,
        "eos_token_id": eos_token_id,
    }


# By model type: the architecture, whether q, k and v have biases, and whether q and k have norms.
_MODEL_TYPES: dict[Family, tuple[str, bool, bool]] = {
    "llama": ("LlamaForCausalLM", False, False),
    "mistral": ("MistralForCausalLM", False, False),
    "qwen2": ("Qwen2ForCausalLM", True, False),
    "qwen3": ("Qwen3ForCausalLM", False, True),
}
_DEFAULTS: dict[Family, dict[str, Any]] = {
    "llama": _class_defaults(32_000, 11_008, None, 2048, 1, 2),
    "mistral": _class_defaults(32_000, 14_336, 8, 131_072, 1, 2) | {"sliding_window": 4096},
    "qwen2": _class_defaults(151_936, 22_016, 32, 32_768, None, None),
    "qwen3": _class_defaults(151_936, 22_016, 32, 32_768, None, None) | {"head_dim": 128},
}
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    **JSON_NEUTRAL,
    "hidden_act": ("silu", "swish"),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "attention_out_bias": (False, None),
    "partial_rotary_factor": (1.0, None),
    "rope_interleaved": (False, None),
    "use_mrope": (False, None),
    "no_rope_layers": (None,),
    "use_parallel_residual": (False, None),
}
_GGUF_KEYS = frozenset(
    [
        "attention.key_length",
        "attention.value_length",
        "attention.layer_norm_rms_epsilon",
        "attention.sliding_window",
    ]
)
_GGUF_NEUTRAL = {**GGUF_NEUTRAL, **ROPE_NEUTRAL, "use_parallel_residual": (False,)}


def _read_config(fields: JsonFields) -> LlamaConfig:
    family: Family = fields.raw["model_type"]
    n_heads = fields.count("num_attention_heads")
    d_model = fields.count("hidden_size")
    n_kv_heads = fields.count("num_key_value_heads", n_heads)
    if n_heads % n_kv_heads:
        raise fields.refuse("num_key_value_heads", f"a divisor of num_attention_heads = {n_heads}")
    if fields.raw.get("head_dim") is None and d_model % n_heads:
        raise fields.refuse(
            "head_dim", "a size, as num_attention_heads does not divide hidden_size"
        )
    # The head size of Qwen3 does not follow from other fields.
    head_dim = fields.count("head_dim", None if family == "qwen3" else d_model // n_heads)
    if head_dim % 2:
        raise fields.refuse("head_dim", "an even number")
    n_layers = fields.count("num_hidden_layers")
    max_positions = fields.count("max_position_embeddings")
    _refuse_sliding_window(fields, family, n_layers, max_positions)
    bos = fields.token_ids("bos_token_id")
    _, qkv_bias, qk_norm = _MODEL_TYPES[family]
    return LlamaConfig(
        vocab_size=fields.count("vocab_size"),
        d_model=d_model,
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=head_dim,
        d_ff=fields.count("intermediate_size"),
        max_positions=max_positions,
        rope=rope_from_json(fields, max_positions, head_dim),
        norm_eps=fields.number("rms_norm_eps"),
        tie_embeddings=fields.flag("tie_word_embeddings", False),
        qkv_bias=qkv_bias,
        qk_norm=qk_norm,
        family=family,
        bos_token_id=bos[0] if bos else None,
        eos_token_ids=fields.token_ids("eos_token_id"),
    )


def _refuse_sliding_window(
    fields: JsonFields, family: Family, n_layers: int, max_positions: int
) -> None:
    """Raise `UserError` for a sliding window that some layer uses and that is shorter than the
    maximum length."""
    layer_types = fields.raw.get("layer_types")
    if layer_types is not None and layer_types != ["full_attention"] * len(layer_types):
        raise fields.refuse("layer_types", '"full_attention" for every layer')
    window = fields.raw.get("sliding_window")
    if window is None or (type(window) is int and window >= max_positions):
        return
    if family in ("qwen2", "qwen3"):
        # The first `max_window_layers` layers of these model types have full attention.
        full = layer_types is not None or fields.count("max_window_layers", 28) >= n_layers
        if not fields.flag("use_sliding_window", False) or full:
            return
    raise fields.refuse("sliding_window", "null, or at least max_position_embeddings")


def _write_config(config: LlamaConfig) -> Json:
    architecture, *flags = _MODEL_TYPES[config.family]
    if [config.qkv_bias, config.qk_norm] != flags:
        raise UserError(
            f"no {architecture} has qkv_bias={config.qkv_bias} and "
            f"qk_norm={config.qk_norm}; the model cannot be written as a Hugging Face directory"
        )
    raw: Json = {
        "hidden_size": config.d_model,
        "intermediate_size": config.d_ff,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_positions,
        "rms_norm_eps": config.norm_eps,
        "attention_dropout": 0.0,
        "rope_theta": config.rope.theta,
        **rope_to_json(config.rope, config.max_positions),
    }
    match config.family:
        case "llama":
            return raw | {"attention_bias": False, "mlp_bias": False}
        case "mistral":
            return raw | {"sliding_window": None}
    window = {"use_sliding_window": False, "sliding_window": None}
    return raw | window | {"max_window_layers": config.n_layers}


def _read_gguf(fields: GgufFields) -> LlamaConfig:
    decoder = fields.decoder()
    d_model, n_heads = decoder["d_model"], decoder["n_heads"]
    n_kv_heads = fields.count("attention.head_count_kv", n_heads)
    if n_heads % n_kv_heads:
        raise fields.refuse("attention.head_count_kv", f"a divisor of {n_heads} heads")
    head_dim = fields.count("attention.key_length", d_model // n_heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if fields.count(key, head_dim) != head_dim:
            raise fields.refuse(key, f"the head size {head_dim}")
    max_positions = decoder["max_positions"]
    window = fields.metadata.get("attention.sliding_window", 0)
    if window and window < max_positions:
        raise fields.refuse("attention.sliding_window", f"0 or at least {max_positions}")
    family: Family = fields.architecture  # type: ignore[assignment]  # one of those declared below
    _, qkv_bias, qk_norm = _MODEL_TYPES[family]
    return LlamaConfig(
        **decoder,
        n_kv_heads=n_kv_heads,
        head_dim=head_dim,
        rope=rope_from_gguf(fields, head_dim, max_positions),
        norm_eps=fields.number("attention.layer_norm_rms_epsilon"),
        qkv_bias=qkv_bias,
        qk_norm=qk_norm,
        family=family,
    )


def _write_gguf(config: LlamaConfig) -> Json:
    keys = {
        **decoder_keys(config),
        **rope_to_gguf(config.rope, config.rotary_dim),
        "attention.head_count_kv": config.n_kv_heads,
        "attention.layer_norm_rms_epsilon": config.norm_eps,
    }
    if config.head_dim * config.n_heads != config.d_model:
        keys |= dict.fromkeys(["attention.key_length", "attention.value_length"], config.head_dim)
    return keys


def _format(family: Family, gguf_model_type: Family | None = None) -> ModelFormat:
    return ModelFormat(
        model_type=family,
        architecture=_MODEL_TYPES[family][0],
        tensors=_tensors(rotary_pairs=family == "llama"),
        defaults=_DEFAULTS[family],
        neutral=_NEUTRAL,
        read_config=_read_config,
        write_config=_write_config,
        gguf=GgufFormat(
            architecture=family,
            keys=GGUF_KEYS | ROPE_KEYS | _GGUF_KEYS,
            neutral=_GGUF_NEUTRAL,
            read_config=_read_gguf,
            write_config=_write_gguf,
            ignored=frozenset({ROPE_FREQS}),
        )
        if gguf_model_type is None
        else None,
        gguf_model_type=gguf_model_type,
        ignored=r"(model\.layers\.\d+\.self_attn|model)\.rotary_emb\.inv_freq",
    )


FORMATS = (_format("llama"), _format("mistral", "llama"), _format("qwen2"), _format("qwen3"))
