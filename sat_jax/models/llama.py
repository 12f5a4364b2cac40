"""The Llama family: Llama, TinyLlama, SmolLM2, Mistral, Qwen2 (q/k/v bias), Qwen3 (q/k norm)."""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from sat_jax.models.llama_config import LlamaConfig
from sat_jax.nn.attention.grouped_query import Attention
from sat_jax.nn.context import Context
from sat_jax.nn.decoder import Compute, Decoder
from sat_jax.nn.linear import dense
from sat_jax.nn.mlp import GatedMLP
from sat_jax.nn.norms import rms_norm
from sat_jax.nn.param import normal, param


class Block(nnx.Module):
    """All layers; every parameter has the layers in front, `[L, ...]`."""

    def __init__(self, config: LlamaConfig, rngs: nnx.Rngs):
        layers, embed = config.n_layers, config.d_model
        out_scale = 0.02 / (2 * layers) ** 0.5
        self.attention_norm = param(jnp.ones, "vector", layer=layers, norm=embed)
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
        self.mlp_norm = param(jnp.ones, "vector", layer=layers, norm=embed)
        self.mlp = GatedMLP(
            layers=layers, channels=config.d_ff, embed=embed, out_scale=out_scale, rngs=rngs
        )
        self.norm_eps = config.norm_eps

    def __call__(self, x: Float[Array, "B T D"], context: Context) -> Float[Array, "B T D"]:
        """Return the residual stream after one layer (the L axis taken away)."""
        x = x + self.attention(rms_norm(x, self.attention_norm, self.norm_eps), context)
        return x + self.mlp(rms_norm(x, self.mlp_norm, self.norm_eps), context)


class Llama(Decoder):
    """Token embedding, layers, RMS norm, and a head that may be the embedding."""

    def __init__(self, config: LlamaConfig, compute: Compute = Compute(), *, rngs: nnx.Rngs):
        self.config, self.compute = config, compute
        table = {"vocab": config.vocab_size, "embed": config.d_model}
        self.embed = param(normal(rngs, 0.02), "embedding", **table)
        self.layers = Block(config, rngs)
        self.final_norm = param(jnp.ones, "vector", norm=config.d_model)
        self.lm_head = nnx.data(None)
        if not config.tie_embeddings:
            self.lm_head = param(normal(rngs, 0.02), "embedding", **table)

    def embed_tokens(
        self, tokens: Int[Array, "B T"], positions: Int[Array, "B T"]
    ) -> Float[Array, "B T D"]:
        """Return the rows of the token embedding."""
        del positions
        return jnp.take(dense(self.embed), tokens, axis=0)

    def normalize(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Return the normed residual stream after the last layer."""
        return rms_norm(x, self.final_norm, self.config.norm_eps)

    def head_weight(self) -> nnx.Param:
        """Return the output embedding `[V, D]`: that of the tokens where they are tied."""
        return self.embed if self.lm_head is None else self.lm_head
