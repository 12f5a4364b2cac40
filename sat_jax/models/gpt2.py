"""GPT-2: learned positions, layer norms, biases, a plain MLP.

Hugging Face stores weights transposed (`Conv1D`), and query, key and value as one tensor.
"""

import dataclasses
from typing import Literal

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

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
from sat_jax.nn.attention.grouped_query import Attention
from sat_jax.nn.context import Context
from sat_jax.nn.decoder import Compute, Decoder, lookup
from sat_jax.nn.linear import add_bias
from sat_jax.nn.mlp import MLP, Activation
from sat_jax.nn.norms import layer_norm
from sat_jax.nn.param import normal, param


@dataclasses.dataclass(frozen=True, kw_only=True)
class GPT2Config(DecoderConfig):
    """Shape and function of a model. `d_model` is a multiple of `n_heads`."""

    activation: Activation = "gelu_new"
    tie_embeddings: bool = True
    family: Literal["gpt2"] = "gpt2"

    @property
    def head_dim(self) -> int:
        """Size of a head, E."""
        return self.d_model // self.n_heads


class Block(nnx.Module):
    """All layers; every parameter has the layers in front, `[L, ...]`."""

    def __init__(self, config: GPT2Config, rngs: nnx.Rngs):
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
            bias=True,
            rngs=rngs,
        )
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
        self.norm_eps = config.norm_eps

    def __call__(self, x: Float[Array, "B T D"], context: Context) -> Float[Array, "B T D"]:
        """Return the residual stream after one layer (the L axis taken away)."""
        normed = layer_norm(x, self.attention_norm, self.attention_norm_bias, self.norm_eps)
        x = x + add_bias(self.attention(normed, context), self.attention_output_bias)
        normed = layer_norm(x, self.mlp_norm, self.mlp_norm_bias, self.norm_eps)
        return x + add_bias(self.mlp(normed, context), self.mlp_output_bias)


class GPT2(Decoder):
    """Embeddings of tokens and positions, layers, layer norm, and a head that is the embedding."""

    def __init__(self, config: GPT2Config, compute: Compute = Compute(), *, rngs: nnx.Rngs):
        self.config, self.compute = config, compute
        table = {"vocab": config.vocab_size, "embed": config.d_model}
        self.embed = param(normal(rngs, 0.02), table, "embedding")
        positions = {"position": config.max_positions, "embed": config.d_model}
        self.positions = param(normal(rngs, 0.01), positions, "embedding")
        self.layers = Block(config, rngs)
        self.final_norm = param(jnp.ones, {"norm": config.d_model}, "vector")
        self.final_norm_bias = param(jnp.zeros, {"norm": config.d_model}, "vector")
        self.lm_head = nnx.data(None)
        if not config.tie_embeddings:
            self.lm_head = param(normal(rngs, 0.02), table, "embedding")

    def embed_tokens(
        self, tokens: Int[Array, "B T"], positions: Int[Array, "B T"]
    ) -> Float[Array, "B T D"]:
        """Return the sum of the rows of both embeddings."""
        return lookup(self.embed, tokens) + lookup(self.positions, positions)

    def normalize(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Return the normed residual stream after the last layer."""
        return layer_norm(x, self.final_norm, self.final_norm_bias, self.config.norm_eps)


def _layer(
    weight: str, bias: str, huggingface: str, gguf: str, layout: Layout
) -> tuple[Tensor, Tensor]:
    """Declare the weight and bias of a module in each layer, which GGUF stores in `layout`."""
    conv1d: dict[Layout, Layout] = {"rows": "columns", "columns": "rows", "vector": "vector"}
    return weight_and_bias(
        layer_paths(weight),
        layer_paths(bias),
        Stored(f"transformer.h.{{layer}}.{huggingface}", conv1d[layout]),
        Stored(f"blk.{{layer}}.{gguf}", layout),
    )


_QKV = "attention/query attention/key attention/value"
_QKV_BIAS = "attention/query_bias attention/key_bias attention/value_bias"
_TENSORS = (
    tensor("embed", "transformer.wte.weight", "token_embd.weight"),
    tensor("positions", "transformer.wpe.weight", "position_embd.weight"),
    tensor("final_norm", "transformer.ln_f.weight", "output_norm.weight", "vector"),
    tensor("final_norm_bias", "transformer.ln_f.bias", "output_norm.bias", "vector"),
    tensor("lm_head", "lm_head.weight", "output.weight"),
    *_layer("attention_norm", "attention_norm_bias", "ln_1", "attn_norm", "vector"),
    *_layer(_QKV, _QKV_BIAS, "attn.c_attn", "attn_qkv", "rows"),
    *_layer("attention/output", "attention_output_bias", "attn.c_proj", "attn_output", "columns"),
    *_layer("mlp_norm", "mlp_norm_bias", "ln_2", "ffn_norm", "vector"),
    *_layer("mlp/up", "mlp/up_bias", "mlp.c_fc", "ffn_up", "rows"),
    *_layer("mlp/down", "mlp_output_bias", "mlp.c_proj", "ffn_down", "columns"),
)


def _read_config(fields: JsonFields) -> GPT2Config:
    d_model, n_heads = fields.count("n_embd"), fields.count("n_head")
    if d_model % n_heads:
        raise fields.refuse("n_head", f"a divisor of n_embd = {d_model}")
    max_positions = fields.count("n_positions")
    fields.check_equal({"head_dim": d_model // n_heads, "n_ctx": max_positions})
    bos = fields.token_ids("bos_token_id")
    return GPT2Config(
        vocab_size=fields.count("vocab_size"),
        d_model=d_model,
        n_layers=fields.count("n_layer"),
        n_heads=n_heads,
        d_ff=fields.count("n_inner", 4 * d_model),
        max_positions=max_positions,
        norm_eps=fields.number("layer_norm_epsilon"),
        activation=fields.choice("activation_function", ACTIVATIONS, "gelu_new"),
        tie_embeddings=fields.flag("tie_word_embeddings", True),
        bos_token_id=bos[0] if bos else None,
        eos_token_ids=fields.token_ids("eos_token_id"),
    )


def _write_config(config: GPT2Config) -> Json:
    return {
        "n_embd": config.d_model,
        "n_layer": config.n_layers,
        "n_head": config.n_heads,
        "n_inner": config.d_ff,
        "n_positions": config.max_positions,
        "n_ctx": config.max_positions,  # what llama.cpp's converter reads
        "layer_norm_epsilon": config.norm_eps,
        "activation_function": config.activation,
        "attn_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
    }


def _read_gguf(fields: GgufFields) -> GPT2Config:
    norm_eps = fields.number("attention.layer_norm_epsilon")
    return GPT2Config(**fields.multi_head_decoder(), norm_eps=norm_eps)


def _write_gguf(config: GPT2Config) -> Json:
    return decoder_keys(config) | {"attention.layer_norm_epsilon": config.norm_eps}


FORMATS = (
    ModelFormat(
        model_type="gpt2",
        architecture="GPT2LMHeadModel",
        tensors=_TENSORS,
        defaults={
            "vocab_size": 50_257,
            "n_embd": 768,
            "n_layer": 12,
            "n_head": 12,
            "n_inner": None,
            "n_positions": 1024,
            "layer_norm_epsilon": 1e-5,
            "activation_function": "gelu_new",
            "tie_word_embeddings": True,
            "bos_token_id": 50_256,
            "eos_token_id": 50_256,
        },
        aliases={
            "hidden_size": "n_embd",
            "num_hidden_layers": "n_layer",
            "num_attention_heads": "n_head",
            "max_position_embeddings": "n_positions",
        },
        neutral=JSON_NEUTRAL
        | {
            "add_cross_attention": (False, None),
            "scale_attn_weights": (True, None),
            "scale_attn_by_inverse_layer_idx": (False, None),
        },
        read_config=_read_config,
        write_config=_write_config,
        gguf=GgufFormat(
            architecture="gpt2",
            keys=GGUF_KEYS | {"attention.layer_norm_epsilon"},
            neutral=GGUF_NEUTRAL,
            read_config=_read_gguf,
            write_config=_write_gguf,
            float32=frozenset({"position_embd.weight"}),
        ),
        # Causal masks.
        ignored=r"(transformer\.)?h\.\d+\.attn\.(bias|masked_bias)",
        optional_prefix="transformer.",
    ),
)
