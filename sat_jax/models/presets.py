"""Published model configurations by name, from their `config.json` files."""

import dataclasses
import difflib
import math
from collections.abc import Mapping
from typing import Any

from sat_jax.errors import UserError
from sat_jax.models.decoder_config import DecoderConfig
from sat_jax.models.gpt2 import GPT2Config
from sat_jax.models.gpt_neox import GPTNeoXConfig
from sat_jax.models.llama import LlamaConfig
from sat_jax.models.retnet import RetNetConfig
from sat_jax.nn.rope import EXTENSIONS, SCALINGS, RopeConfig


def _llama(
    d_model: int, n_layers: int, n_heads: int, n_kv_heads: int, d_ff: int, **fields: Any
) -> LlamaConfig:
    """Return a configuration; `fields` are those that models of a series share or override."""
    sizes = {"d_model": d_model, "n_layers": n_layers, "d_ff": d_ff, "n_heads": n_heads}
    heads = {"n_kv_heads": n_kv_heads, "head_dim": d_model // n_heads}
    return LlamaConfig(**sizes | heads | fields)


def _llama3_rope(factor: float) -> RopeConfig:
    """Return the RoPE of Llama 3.1 and 3.2, which extend 8,192 positions by the `llama3` rule."""
    return RopeConfig(500_000.0, "llama3", factor, original_max_positions=8192)


_LLAMA2: dict[str, Any] = {
    "vocab_size": 32_000,
    "max_positions": 4096,
    "bos_token_id": 1,
    "eos_token_ids": (2,),
}
_LLAMA3: dict[str, Any] = {
    "vocab_size": 128_256,
    "max_positions": 8192,
    "rope": RopeConfig(500_000.0),
    "bos_token_id": 128_000,
    "eos_token_ids": (128_001,),
}
_LLAMA31 = _LLAMA3 | {"max_positions": 131_072, "rope": _llama3_rope(8.0)}
_LLAMA32 = _LLAMA31 | {"rope": _llama3_rope(32.0), "tie_embeddings": True}
_SMOLLM2: dict[str, Any] = {
    "vocab_size": 49_152,
    "max_positions": 8192,
    "rope": RopeConfig(100_000.0),
    "tie_embeddings": True,
    "bos_token_id": 0,
    "eos_token_ids": (0,),
}
# Version 0.3: no sliding window, and a vocabulary of 32,768.
_MISTRAL = _LLAMA2 | {
    "vocab_size": 32_768,
    "max_positions": 32_768,
    "rope": RopeConfig(1_000_000.0),
    "family": "mistral",
}
_QWEN25: dict[str, Any] = {
    "vocab_size": 151_936,
    "max_positions": 32_768,
    "rope": RopeConfig(1_000_000.0),
    "norm_eps": 1e-6,
    "tie_embeddings": True,
    "qkv_bias": True,
    "family": "qwen2",
    "bos_token_id": 151_643,
    "eos_token_ids": (151_643,),
}
_QWEN2 = _QWEN25 | {"max_positions": 131_072}
_QWEN2_7B = _QWEN2 | {"vocab_size": 152_064, "tie_embeddings": False}
_QWEN3 = _QWEN25 | {
    "head_dim": 128,
    "max_positions": 40_960,
    "qkv_bias": False,
    "qk_norm": True,
    "family": "qwen3",
    "eos_token_ids": (151_645,),
}


def _gpt2(d_model: int, n_layers: int, n_heads: int, max_positions: int = 1024) -> GPT2Config:
    return GPT2Config(
        vocab_size=50_257,
        d_model=d_model,
        n_layers=n_layers,
        n_heads=n_heads,
        d_ff=4 * d_model,
        max_positions=max_positions,
        bos_token_id=50_256,
        eos_token_ids=(50_256,),
    )


def _pythia(d_model: int, n_layers: int, n_heads: int, vocab_size: int = 50_304) -> GPTNeoXConfig:
    """The vocabulary is padded to a multiple of 128 times the training's model parallelism."""
    return GPTNeoXConfig(
        vocab_size=vocab_size,
        d_model=d_model,
        n_layers=n_layers,
        n_heads=n_heads,
        d_ff=4 * d_model,
        max_positions=2048,
        bos_token_id=0,
        eos_token_ids=(0,),
    )


def _retnet(d_model: int, n_layers: int, d_hidden: int) -> RetNetConfig:
    """Layers, width and heads of 256 are those of the paper (arXiv:2307.08621, table 2). The widths
    of values and MLP are those of torchscale's recipes of these sizes, whose MLP is gated as here:
    5/3 of the width in place of the paper's 2, for as many parameters. The vocabulary is GPT-2's.
    """
    return RetNetConfig(
        vocab_size=50_257,
        d_model=d_model,
        n_layers=n_layers,
        n_heads=d_model // 256,
        d_value=d_hidden,
        d_ff=d_hidden,
        max_positions=2048,
        tie_embeddings=True,
        bos_token_id=50_256,
        eos_token_ids=(50_256,),
    )


PRESETS: dict[str, DecoderConfig] = {
    # For tests: two layers, two KV groups of two query heads each, and a vocabulary of bytes and
    # control tokens.
    "tiny": LlamaConfig(
        vocab_size=260,
        d_model=64,
        n_layers=2,
        n_heads=4,
        n_kv_heads=2,
        head_dim=16,
        d_ff=128,
        max_positions=512,
        tie_embeddings=True,
    ),
    "llama-2-7b": _llama(4096, 32, 32, 32, 11_008, **_LLAMA2),
    "llama-2-13b": _llama(5120, 40, 40, 40, 13_824, **_LLAMA2),
    "llama-2-70b": _llama(8192, 80, 64, 8, 28_672, **_LLAMA2),
    "llama-3-8b": _llama(4096, 32, 32, 8, 14_336, **_LLAMA3),
    "llama-3-70b": _llama(8192, 80, 64, 8, 28_672, **_LLAMA3),
    "llama-3.1-8b": _llama(4096, 32, 32, 8, 14_336, **_LLAMA31),
    "llama-3.1-70b": _llama(8192, 80, 64, 8, 28_672, **_LLAMA31),
    "llama-3.2-1b": _llama(2048, 16, 32, 8, 8192, **_LLAMA32),
    "llama-3.2-3b": _llama(3072, 28, 24, 8, 8192, **_LLAMA32),
    "tinyllama-1.1b": _llama(2048, 22, 32, 4, 5632, **_LLAMA2 | {"max_positions": 2048}),
    "smollm2-135m": _llama(576, 30, 9, 3, 1536, **_SMOLLM2),
    "smollm2-360m": _llama(960, 32, 15, 5, 2560, **_SMOLLM2),
    "smollm2-1.7b": _llama(2048, 24, 32, 32, 8192, **_SMOLLM2 | {"rope": RopeConfig(130_000.0)}),
    "mistral-7b": _llama(4096, 32, 32, 8, 14_336, **_MISTRAL),
    "qwen2-0.5b": _llama(896, 24, 14, 2, 4864, **_QWEN2),
    "qwen2-1.5b": _llama(1536, 28, 12, 2, 8960, **_QWEN2),
    "qwen2-7b": _llama(3584, 28, 28, 4, 18_944, **_QWEN2_7B),
    "qwen2.5-0.5b": _llama(896, 24, 14, 2, 4864, **_QWEN25),
    "qwen2.5-1.5b": _llama(1536, 28, 12, 2, 8960, **_QWEN2),
    "qwen2.5-3b": _llama(2048, 36, 16, 2, 11_008, **_QWEN25),
    "qwen2.5-7b": _llama(3584, 28, 28, 4, 18_944, **_QWEN2_7B),
    "qwen3-0.6b": _llama(1024, 28, 16, 8, 3072, **_QWEN3),
    "qwen3-1.7b": _llama(2048, 28, 16, 8, 6144, **_QWEN3),
    "qwen3-4b": _llama(2560, 36, 32, 8, 9728, **_QWEN3),
    "qwen3-8b": _llama(4096, 36, 32, 8, 12_288, **_QWEN3 | {"tie_embeddings": False}),
    "gpt2": _gpt2(768, 12, 12),
    "gpt2-medium": _gpt2(1024, 24, 16),
    "gpt2-large": _gpt2(1280, 36, 20),
    "gpt2-xl": _gpt2(1600, 48, 25),
    # Layers, heads and their size of 128 are those of GPT-3 13B (arXiv:2005.14165, table 2.1, whose
    # width of 5,140 is no multiple of 40), its context too; the vocabulary is that of GPT-2, which
    # GPT-3 shares. arXiv:2304.05511 trains a "GPT 13B" and its abstract has no sizes.
    "gpt-13b": _gpt2(5120, 40, 40, max_positions=2048),
    "pythia-14m": _pythia(128, 6, 4),
    "pythia-31m": _pythia(256, 6, 8),
    "pythia-70m": _pythia(512, 6, 8),
    "pythia-160m": _pythia(768, 12, 12),
    "pythia-410m": _pythia(1024, 24, 16),
    "pythia-1b": _pythia(2048, 16, 8),
    "pythia-1.4b": _pythia(2048, 24, 16),
    "pythia-2.8b": _pythia(2560, 32, 32),
    "pythia-6.9b": _pythia(4096, 32, 32, vocab_size=50_432),
    "pythia-12b": _pythia(5120, 36, 40, vocab_size=50_688),
    # For tests, as `tiny` above.
    "retnet-tiny": RetNetConfig(
        vocab_size=260,
        d_model=64,
        n_layers=2,
        n_heads=4,
        d_value=128,
        d_ff=128,
        max_positions=512,
        tie_embeddings=True,
    ),
    "retnet-1.3b": _retnet(2048, 24, 3456),
    "retnet-2.7b": _retnet(2560, 32, 4280),
    "retnet-6.7b": _retnet(4096, 32, 6912),
}


def preset(name: str) -> DecoderConfig:
    """Return the configuration `name`. Raises `UserError` with the near names if there is none."""
    if name in PRESETS:
        return PRESETS[name]
    near = difflib.get_close_matches(name.lower(), PRESETS, n=4, cutoff=0.5)
    names = f"near: {', '.join(near)}" if near else f"accepted: {', '.join(PRESETS)}"
    raise UserError(f"no preset {name!r}; {names}")


def resized(config: DecoderConfig, sizes: Mapping[str, int]) -> DecoderConfig:
    """Return the configuration with other sizes, by the names of its fields.

    KV heads keep their ratio to query heads, and values of retention theirs to the width. With
    another vocabulary, special tokens are none. Raises `UserError` for heads that do not divide the
    width, and for heads or a width that are no multiple of the ratio.
    """
    if not sizes:
        return config
    changes: dict[str, Any] = dict(sizes)
    width, heads = sizes.get("d_model", config.d_model), sizes.get("n_heads", config.n_heads)
    if width % heads:
        raise UserError(f"model.n_heads {heads} does not divide model.d_model {width}")
    if {"d_model", "n_heads"} & sizes.keys() and hasattr(config, "n_kv_heads"):
        ratio = config.n_heads // config.n_kv_heads
        if heads % ratio:
            raise UserError(
                f"model.n_heads {heads} with {ratio} query heads for each KV head; accepted:"
                f" multiples of {ratio}"
            )
        changes |= {"n_kv_heads": heads // ratio, "head_dim": width // heads}
    if "d_model" in sizes and hasattr(config, "d_value"):
        changes["d_value"], remainder = divmod(config.d_value * width, config.d_model)
        if remainder:
            multiple = config.d_model // math.gcd(config.d_model, config.d_value)
            raise UserError(
                f"model.d_model {width} with values of {config.d_value} / {config.d_model} of it;"
                f" accepted: multiples of {multiple}"
            )
    if "vocab_size" in sizes:
        changes |= {"bos_token_id": None, "eos_token_ids": ()}
    return dataclasses.replace(config, **changes)


def extended(config: DecoderConfig, rope_type: str, factor: float) -> DecoderConfig:
    """Return the configuration for `factor` times the length of its first training, with a scaling
    of rotary positions (a name in `EXTENSIONS`) in place of its own.

    Raises `UserError` for a model without rotary positions, another name, and a factor below 1.
    """
    if rope_type not in EXTENSIONS:
        raise UserError(f"rope type {rope_type!r}; accepted: {', '.join(EXTENSIONS)}")
    if not factor >= 1:
        raise UserError(f"rope factor {factor:g}; accepted: 1 or more")
    rope = config.rope
    if rope is None:
        raise UserError(
            f"model.rope_type {rope_type!r}: a {config.family} model has no rotary positions;"
            " accepted: None"
        )
    first = rope.original_max_positions or round(config.max_positions / rope.factor)
    known = {"factor": factor, "original_max_positions": first}
    scaling = SCALINGS[rope_type]
    fields: Any = {name: value for name, value in known.items() if name in scaling.fields}
    length = first if scaling.unlimited else int(factor * first)
    rope = RopeConfig(rope.theta, rope_type, **fields)
    changes: dict[str, Any] = {"rope": rope, "max_positions": length}
    return dataclasses.replace(config, **changes)
