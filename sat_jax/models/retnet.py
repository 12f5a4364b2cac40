"""RetNet: retention in place of attention, RMS norms, a gated MLP, no biases.

Read and written as torchscale has it: `decoder_config.json` and `decoder.safetensors`. Two fields
are added in written files: `retention_normalization` (missing: `absolute_sum`, as torchscale's
repository computes), and those that every config here has, such as the end tokens.
"""

import dataclasses
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from sat_jax.errors import UserError
from sat_jax.models.decoder_config import DecoderConfig
from sat_jax.models.format_fields import Json, JsonFields
from sat_jax.models.formats import Files, Layout, ModelFormat, Stored, Tensor, layer_paths
from sat_jax.nn.context import Context
from sat_jax.nn.decoder import Compute, Decoder
from sat_jax.nn.linear import dense
from sat_jax.nn.mlp import GatedActivation, GatedMLP
from sat_jax.nn.norms import rms_norm
from sat_jax.nn.param import constant, normal, param
from sat_jax.nn.retention import Normalization, Retention, chunk_of


@dataclasses.dataclass(frozen=True, kw_only=True)
class RetNetConfig(DecoderConfig):
    """Shape and function of a model. `d_model` is a multiple of `2 n_heads` and `d_value` of
    `n_heads`, else `UserError`.

    `d_value` is the width of all heads' values together. `normalization`: see `nn.retention`.
    `chunk`: tokens whose pairs are computed at once; changes no value beyond rounding. None: as
    the size of a head asks for, `chunk_of`.
    """

    d_value: int
    norm_eps: float = 1e-6
    activation: GatedActivation = "silu"
    normalization: Normalization = "decay"
    chunk: int | None = None
    family: Literal["retnet"] = "retnet"

    def __post_init__(self) -> None:
        if self.d_model % (2 * self.n_heads) or self.d_value % self.n_heads:
            raise UserError(
                f"retnet with d_model {self.d_model}, d_value {self.d_value} and {self.n_heads}"
                f" heads; accepted: multiples of {2 * self.n_heads} and of {self.n_heads}"
            )

    @property
    def head_dim(self) -> int:
        """Size of a query or key, E."""
        return self.d_model // self.n_heads

    @property
    def rotary_dim(self) -> int:
        """Rotated dimensions of a head: all."""
        return self.head_dim

    @property
    def chunk_tokens(self) -> int:
        """Tokens of a chunk."""
        return self.chunk or chunk_of(self.head_dim, self.d_value // self.n_heads)


class Block(nnx.Module):
    """All layers; every parameter has the layers in front, `[L, ...]`."""

    def __init__(self, config: RetNetConfig, rngs: nnx.Rngs):
        layers, embed = config.n_layers, config.d_model
        out_scale = 0.02 / (2 * layers) ** 0.5
        self.retention_norm = param(jnp.ones, {"layer": layers, "norm": embed}, "vector")
        self.retention = Retention(
            layers=layers,
            heads=config.n_heads,
            head_dim=config.head_dim,
            value_dim=config.d_value // config.n_heads,
            embed=embed,
            out_scale=out_scale,
            norm_eps=config.norm_eps,
            normalization=config.normalization,
            chunk=config.chunk_tokens,
            rngs=rngs,
        )
        self.mlp_norm = param(jnp.ones, {"layer": layers, "norm": embed}, "vector")
        self.mlp = GatedMLP(
            layers=layers,
            channels=config.d_ff,
            embed=embed,
            activation=config.activation,
            out_scale=out_scale,
            rngs=rngs,
        )
        self.norm_eps = config.norm_eps

    def __call__(self, x: Float[Array, "B T D"], context: Context) -> Float[Array, "B T D"]:
        """Return the residual stream after one layer (the L axis taken away)."""
        x = x + self.retention(rms_norm(x, self.retention_norm, self.norm_eps), context)
        return x + self.mlp(rms_norm(x, self.mlp_norm, self.norm_eps), context)


class RetNet(Decoder):
    """Token embedding, layers, RMS norm, and an output head that may be tied to the embedding.

    `angle`: radians per position of every dimension of a head; those of a rotated pair are equal.
    """

    def __init__(self, config: RetNetConfig, compute: Compute = Compute(), *, rngs: nnx.Rngs):
        self.config, self.compute = config, compute
        table = {"vocab": config.vocab_size, "embed": config.d_model}
        self.embed = param(normal(rngs, 0.02), table, "embedding")
        self.angle = constant(np.repeat(angles(config.rotary_dim), 2), ("angle",))
        self.layers = Block(config, rngs)
        self.final_norm = param(jnp.ones, {"norm": config.d_model}, "vector")
        self.lm_head = nnx.data(None)
        if not config.tie_embeddings:
            self.lm_head = param(normal(rngs, 0.02), table, "embedding")

    def normalize(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Return the normed residual stream after the last layer."""
        return rms_norm(x, self.final_norm, self.config.norm_eps)

    def rotary(
        self, positions: Int[Array, "B T"], lengths: Int[Array, "B T"] | None
    ) -> tuple[Array, Array]:
        """Return cosines and sines `[B, T, E / 2]`."""
        del lengths
        angles_BTR = positions[..., None] * dense(self.angle)[None, None, ::2]
        return jnp.cos(angles_BTR), jnp.sin(angles_BTR)


def angles(rotary_dim: int) -> Float[np.ndarray, " half"]:
    """Return radians per position of every pair, float64: 10000^-x for x from 0 to 1, both
    included, unlike rotary embeddings elsewhere."""
    return 10_000.0 ** -np.linspace(0, 1, rotary_dim // 2)


def _layer(path: str, name: str, layout: Layout = "rows", rotary_pairs: bool = False) -> Tensor:
    stored = Stored(f"layers.{{layer}}.{name}.weight", layout, rotary_pairs=rotary_pairs)
    return Tensor(layer_paths(path), stored, None)


_TENSORS = (
    Tensor(("embed",), Stored("embed_tokens.weight", "rows"), None),
    Tensor(("final_norm",), Stored("layer_norm.weight", "vector"), None),
    Tensor(("lm_head",), Stored("output_projection.weight", "rows"), None),
    Tensor(("angle",), Stored("retnet_rel_pos.angle", "vector"), None),
    # One tensor for all layers.
    Tensor(layer_paths("retention/log_decay"), Stored("retnet_rel_pos.decay", "vector"), None),
    _layer("retention_norm", "retention_layer_norm", "vector"),
    # torchscale rotates adjacent dimensions.
    _layer("retention/query", "retention.q_proj", rotary_pairs=True),
    _layer("retention/key", "retention.k_proj", rotary_pairs=True),
    _layer("retention/value", "retention.v_proj"),
    _layer("retention/gate", "retention.g_proj"),
    _layer("retention/output", "retention.out_proj", "columns"),
    _layer("mlp_norm", "final_layer_norm", "vector"),
    # What torchscale calls `gate` is the factor without an activation.
    _layer("mlp/gate", "ffn.fc1"),
    _layer("mlp/up", "ffn.gate"),
    _layer("mlp/down", "ffn.fc2", "columns"),
)
_ACTIVATIONS: dict[str, GatedActivation] = {"gelu": "gelu", "swish": "silu"}
_NORMALIZATIONS: dict[str, Normalization] = {
    "decay": "decay",
    "sum": "sum",
    "absolute_sum": "absolute_sum",
}
_CHUNK = "recurrent_chunk_size"
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "decoder_normalize_before": (True,),
    "deepnorm": (False,),
    "layernorm_embedding": (False,),
    "multiway": (False,),
    "moe_freq": (0,),
    "moe_expert_count": (0,),
    "no_output_layer": (False,),
    "no_scale_embedding": (True,),
    "use_xmoe": (False,),
    "xpos_rel_pos": (False,),
    # What only attention has.
    "num_key_value_heads": (None,),
    "rope_parameters": (None,),
    "rope_scaling": (None,),
}


def _read_config(fields: JsonFields) -> RetNetConfig:
    d_model, n_heads = fields.count("decoder_embed_dim"), fields.count("decoder_retention_heads")
    d_value = fields.count("decoder_value_embed_dim")
    if d_model % (2 * n_heads):
        raise fields.refuse("decoder_embed_dim", f"a multiple of {2 * n_heads}: heads of even size")
    if d_value % n_heads:
        raise fields.refuse("decoder_value_embed_dim", f"a multiple of the {n_heads} heads")
    tied = fields.flag("share_decoder_input_output_embed", False)
    fields.check_equal({"tie_word_embeddings": tied})
    bos = fields.token_ids("bos_token_id")
    return RetNetConfig(
        vocab_size=fields.count("vocab_size"),
        d_model=d_model,
        n_layers=fields.count("decoder_layers"),
        n_heads=n_heads,
        d_value=d_value,
        d_ff=fields.count("decoder_ffn_embed_dim"),
        max_positions=fields.count("max_target_positions"),
        norm_eps=fields.number("layernorm_eps"),
        activation=fields.choice("activation_fn", _ACTIVATIONS, "gelu"),
        normalization=fields.choice("retention_normalization", _NORMALIZATIONS, "absolute_sum"),
        chunk=fields.count(_CHUNK) if fields.raw.get(_CHUNK) is not None else None,
        tie_embeddings=tied,
        bos_token_id=bos[0] if bos else None,
        eos_token_ids=fields.token_ids("eos_token_id"),
    )


def _write_config(config: RetNetConfig) -> Json:
    names = {activation: name for name, activation in _ACTIVATIONS.items()}
    return {
        "decoder_embed_dim": config.d_model,
        "decoder_value_embed_dim": config.d_value,
        "decoder_retention_heads": config.n_heads,
        "decoder_ffn_embed_dim": config.d_ff,
        "decoder_layers": config.n_layers,
        "decoder_normalize_before": True,
        "activation_fn": names[config.activation],
        "dropout": 0.0,
        "drop_path_rate": 0.0,
        "activation_dropout": 0.0,
        "no_scale_embedding": True,
        "layernorm_embedding": False,
        "share_decoder_input_output_embed": config.tie_embeddings,
        "max_target_positions": config.max_positions,
        "layernorm_eps": config.norm_eps,
        "chunkwise_recurrent": False,
        **({_CHUNK: config.chunk} if config.chunk else {}),
        "retention_normalization": config.normalization,
    }


FORMATS = (
    ModelFormat(
        model_type="retnet",
        architecture="RetNetDecoder",
        tensors=_TENSORS,
        defaults={
            "decoder_embed_dim": 768,
            "decoder_value_embed_dim": 1280,
            "decoder_retention_heads": 3,
            "decoder_ffn_embed_dim": 1280,
            "decoder_layers": 12,
            "decoder_normalize_before": True,
            "activation_fn": "gelu",
            "no_scale_embedding": True,
            "share_decoder_input_output_embed": False,
            "max_target_positions": 1024,
            "layernorm_eps": 1e-6,
        },
        neutral=_NEUTRAL,
        read_config=_read_config,
        write_config=_write_config,
        files=Files("decoder_config.json", "decoder", tied_head=True),
    ),
)
