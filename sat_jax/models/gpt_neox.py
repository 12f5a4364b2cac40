"""GPT-NeoX, as in the Pythia models: parallel residual, partial rotary positions, biases.

Hugging Face stores query, key and value as one tensor, head by head; GGUF one after the other.
"""

import dataclasses
from typing import Literal

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from sat_jax.models.decoder_config import DecoderConfig
from sat_jax.models.format_fields import (
    ACTIVATIONS,
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
    weight_and_bias,
)
from sat_jax.models.rope_formats import (
    ROPE_KEYS,
    ROPE_NEUTRAL,
    nested_fields,
    rope_from_gguf,
    rope_from_json,
    rope_to_gguf,
    rope_to_json,
)
from sat_jax.nn.attention.grouped_query import Attention
from sat_jax.nn.context import Context
from sat_jax.nn.decoder import Compute, Decoder
from sat_jax.nn.linear import add_bias
from sat_jax.nn.mlp import MLP, Activation
from sat_jax.nn.norms import layer_norm
from sat_jax.nn.param import normal, param
from sat_jax.nn.rope import RopeConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class GPTNeoXConfig(DecoderConfig):
    """Shape and function of a model. `d_model` is a multiple of `n_heads`.

    The first `rotary_fraction` of each head's dimensions is rotated. `parallel_residual`: attention
    and MLP both read the block's input. `attention_bias`: biases on q, k, v and on the output.
    """

    rope: RopeConfig = RopeConfig()
    rotary_fraction: float = 0.25
    parallel_residual: bool = True
    activation: Activation = "gelu"
    attention_bias: bool = True
    family: Literal["gpt_neox"] = "gpt_neox"

    @property
    def head_dim(self) -> int:
        """Size of a head, E."""
        return self.d_model // self.n_heads

    @property
    def rotary_dim(self) -> int:
        """Rotated dimensions of a head."""
        return int(self.head_dim * self.rotary_fraction)


class Block(nnx.Module):
    """All layers; every parameter has the layers in front, `[L, ...]`."""

    def __init__(self, config: GPTNeoXConfig, rngs: nnx.Rngs):
        layers, embed = config.n_layers, config.d_model
        out_scale = 0.02 / (2 * layers) ** 0.5
        norm = {"layer": layers, "norm": embed}
        self.attention_norm = param(jnp.ones, norm, "vector")
        self.attention_norm_bias = param(jnp.zeros, norm, "vector")
        self.attention = Attention(
            layers=layers,
            kv_groups=config.n_heads,
            query_heads=1,
            head_dim=config.head_dim,
            embed=embed,
            out_scale=out_scale,
            bias=config.attention_bias,
            rngs=rngs,
        )
        self.attention_output_bias = nnx.data(None)
        if config.attention_bias:
            self.attention_output_bias = param(jnp.zeros, norm, "vector")
        self.mlp_norm = param(jnp.ones, norm, "vector")
        self.mlp_norm_bias = param(jnp.zeros, norm, "vector")
        self.mlp = MLP(
            layers=layers,
            channels=config.d_ff,
            embed=embed,
            activation=config.activation,
            out_scale=out_scale,
            rngs=rngs,
        )
        self.mlp_output_bias = param(jnp.zeros, norm, "vector")
        self.norm_eps, self.parallel_residual = config.norm_eps, config.parallel_residual

    def __call__(self, x: Float[Array, "B T D"], context: Context) -> Float[Array, "B T D"]:
        """Return the residual stream after one layer (the L axis taken away)."""
        normed = layer_norm(x, self.attention_norm, self.attention_norm_bias, self.norm_eps)
        attended = self.attention(normed, context)
        if self.attention_output_bias is not None:
            attended = add_bias(attended, self.attention_output_bias)
        mlp_input = x if self.parallel_residual else x + attended
        normed = layer_norm(mlp_input, self.mlp_norm, self.mlp_norm_bias, self.norm_eps)
        return x + attended + add_bias(self.mlp(normed, context), self.mlp_output_bias)


class GPTNeoX(Decoder):
    """Token embedding, layers, layer norm, and a head that may be the embedding."""

    def __init__(self, config: GPTNeoXConfig, compute: Compute = Compute(), *, rngs: nnx.Rngs):
        self.config, self.compute = config, compute
        table = {"vocab": config.vocab_size, "embed": config.d_model}
        self.embed = param(normal(rngs, 0.02), table, "embedding")
        self.layers = Block(config, rngs)
        self.final_norm = param(jnp.ones, {"norm": config.d_model}, "vector")
        self.final_norm_bias = param(jnp.zeros, {"norm": config.d_model}, "vector")
        self.lm_head = nnx.data(None)
        if not config.tie_embeddings:
            self.lm_head = param(normal(rngs, 0.02), table, "embedding")

    def normalize(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Return the normed residual stream after the last layer."""
        return layer_norm(x, self.final_norm, self.final_norm_bias, self.config.norm_eps)


def _layer(
    weight: str, bias: str, huggingface: str, gguf: str, layout: Layout, by_head: bool = False
) -> tuple[Tensor, Tensor]:
    """Declare the weight and bias of a module in each layer. Hugging Face may store `by_head`."""
    return weight_and_bias(
        layer_paths(weight),
        layer_paths(bias),
        Stored(f"gpt_neox.layers.{{layer}}.{huggingface}", layout, by_head),
        Stored(f"blk.{{layer}}.{gguf}", layout),
    )


_QKV = "attention/query attention/key attention/value"
_QKV_BIAS = "attention/query_bias attention/key_bias attention/value_bias"
_TENSORS = (
    tensor("embed", "gpt_neox.embed_in.weight", "token_embd.weight"),
    tensor("final_norm", "gpt_neox.final_layer_norm.weight", "output_norm.weight", "vector"),
    tensor("final_norm_bias", "gpt_neox.final_layer_norm.bias", "output_norm.bias", "vector"),
    tensor("lm_head", "embed_out.weight", "output.weight"),
    *_layer("attention_norm", "attention_norm_bias", "input_layernorm", "attn_norm", "vector"),
    *_layer(_QKV, _QKV_BIAS, "attention.query_key_value", "attn_qkv", "rows", by_head=True),
    *_layer(
        "attention/output", "attention_output_bias", "attention.dense", "attn_output", "columns"
    ),
    *_layer("mlp_norm", "mlp_norm_bias", "post_attention_layernorm", "ffn_norm", "vector"),
    *_layer("mlp/up", "mlp/up_bias", "mlp.dense_h_to_4h", "ffn_up", "rows"),
    *_layer("mlp/down", "mlp_output_bias", "mlp.dense_4h_to_h", "ffn_down", "columns"),
)


def _read_config(fields: JsonFields) -> GPTNeoXConfig:
    d_model, n_heads = fields.count("hidden_size"), fields.count("num_attention_heads")
    if d_model % n_heads:
        raise fields.refuse("num_attention_heads", f"a divisor of hidden_size = {d_model}")
    fields.check_equal({"head_dim": d_model // n_heads})
    max_positions = fields.count("max_position_embeddings")
    rope, fraction = _read_rope(fields, max_positions, d_model // n_heads)
    bos = fields.token_ids("bos_token_id")
    return GPTNeoXConfig(
        vocab_size=fields.count("vocab_size"),
        d_model=d_model,
        n_layers=fields.count("num_hidden_layers"),
        n_heads=n_heads,
        d_ff=fields.count("intermediate_size"),
        max_positions=max_positions,
        rope=rope,
        rotary_fraction=fraction,
        parallel_residual=fields.flag("use_parallel_residual", True),
        activation=fields.choice("hidden_act", ACTIVATIONS, "gelu"),
        attention_bias=fields.flag("attention_bias", True),
        norm_eps=fields.number("layer_norm_eps"),
        tie_embeddings=fields.flag("tie_word_embeddings", False),
        bos_token_id=bos[0] if bos else None,
        eos_token_ids=fields.token_ids("eos_token_id"),
    )


def _read_rope(fields: JsonFields, max_positions: int, head_dim: int) -> tuple[RopeConfig, float]:
    """Return the RoPE and the rotated part of a head.

    transformers 5 reads them from `rope_parameters` where a file has it, transformers 4 from
    `rotary_emb_base` and `rotary_pct`.
    """
    fraction = fields.number("rotary_pct", 0.25)
    if nested := nested_fields(fields, "rope_parameters"):
        fraction = nested.number("partial_rotary_factor", fraction)
    rotary_dim = int(head_dim * fraction)
    if fraction > 1 or rotary_dim % 2 or not rotary_dim:
        raise fields.refuse("rotary_pct", f"an even part of the head size {head_dim}")
    rope = rope_from_json(
        fields, max_positions, rotary_dim, base="rotary_emb_base", rotary_fraction=fraction
    )
    fields.check_equal({"rotary_pct": fraction, "partial_rotary_factor": fraction})
    return rope, fraction


def _write_config(config: GPTNeoXConfig) -> Json:
    return {
        "hidden_size": config.d_model,
        "intermediate_size": config.d_ff,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "hidden_act": config.activation,
        "max_position_embeddings": config.max_positions,
        "layer_norm_eps": config.norm_eps,
        "rotary_pct": config.rotary_fraction,
        "rotary_emb_base": config.rope.theta,
        **rope_to_json(config.rope, config.max_positions),
        "use_parallel_residual": config.parallel_residual,
        "attention_bias": config.attention_bias,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
    }


def _read_gguf(fields: GgufFields) -> GPTNeoXConfig:
    decoder = fields.multi_head_decoder()
    head_dim = decoder["d_model"] // decoder["n_heads"]
    rotary_dim = fields.count("rope.dimension_count", head_dim)
    if rotary_dim > head_dim or rotary_dim % 2:
        raise fields.refuse("rope.dimension_count", f"an even number up to {head_dim}")
    return GPTNeoXConfig(
        **decoder,
        rope=rope_from_gguf(fields, rotary_dim, decoder["max_positions"]),
        rotary_fraction=rotary_dim / head_dim,
        parallel_residual=fields.flag("use_parallel_residual"),
        attention_bias="blk.0.attn_qkv.bias" in fields.shapes,
        norm_eps=fields.number("attention.layer_norm_epsilon"),
    )


def _write_gguf(config: GPTNeoXConfig) -> Json:
    return {
        **decoder_keys(config),
        **rope_to_gguf(config.rope, config.rotary_dim),
        "use_parallel_residual": config.parallel_residual,
        "attention.layer_norm_epsilon": config.norm_eps,
    }


FORMATS = (
    ModelFormat(
        model_type="gpt_neox",
        architecture="GPTNeoXForCausalLM",
        tensors=_TENSORS,
        defaults={
            "vocab_size": 50_432,
            "hidden_size": 6144,
            "intermediate_size": 24_576,
            "num_hidden_layers": 44,
            "num_attention_heads": 64,
            "hidden_act": "gelu",
            "max_position_embeddings": 2048,
            "layer_norm_eps": 1e-5,
            "use_parallel_residual": True,
            "attention_bias": True,
            "tie_word_embeddings": False,
            "bos_token_id": 0,
            "eos_token_id": 2,
        },
        neutral=JSON_NEUTRAL,
        read_config=_read_config,
        write_config=_write_config,
        gguf=GgufFormat(
            architecture="gptneox",
            keys=GGUF_KEYS | ROPE_KEYS | {"attention.layer_norm_epsilon", "use_parallel_residual"},
            neutral=GGUF_NEUTRAL | ROPE_NEUTRAL,
            read_config=_read_gguf,
            write_config=_write_gguf,
        ),
        # Causal masks and rotary frequencies.
        ignored=r"gpt_neox\.layers\.\d+\.attention\.(bias|masked_bias)"
        r"|gpt_neox\.(layers\.\d+\.attention\.)?rotary_emb\.inv_freq",
    ),
)
