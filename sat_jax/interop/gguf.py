"""GGUF files in: metadata → `LlamaConfig`, quantised tensors → float32.

The `llama` architecture of GGUF rotates adjacent dimensions, so its q and k rows are stored in
pairs and are put back into halves here; the Qwen architectures keep the order of Hugging Face.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader, ReaderTensor
from gguf.quants import dequantize

from sat_jax.errors import UserError
from sat_jax.interop.weights import (
    LFS_POINTER,
    Weights,
    check_tensors,
    is_lfs_pointer,
    stacked_reader,
)
from sat_jax.models.llama_config import Family, LlamaConfig
from sat_jax.nn.rope import RopeConfig, inverse_frequencies

# Mistral's GGUF files say `llama`, and that is what they compute.
_FAMILIES: dict[str, Family] = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
_PAIRED = ("llama",)

_ROPE_FREQS = "rope_freqs.weight"

# Keys below the architecture's name that are read here, and those that change nothing.
_READ = {
    "block_count",
    "context_length",
    "embedding_length",
    "feed_forward_length",
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.value_length",
    "attention.layer_norm_rms_epsilon",
    "attention.sliding_window",
    "rope.dimension_count",
    "rope.freq_base",
    "rope.scaling.type",
    "rope.scaling.factor",
    "rope.scaling.original_context_length",
    "rope.scaling.attn_factor",
    "rope.scaling.yarn_beta_fast",
    "rope.scaling.yarn_beta_slow",
    "rope.scaling.finetuned",
    "vocab_size",
}
# Keys that would change the function, with the values that do not.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "attention.causal": (True,),
    "attention.clamp_kqv": (0.0,),
    "attention.max_alibi_bias": (0.0,),
    "attention.scale": (0.0,),
    "attn_logit_softcapping": (0.0,),
    "embedding_scale": (0.0, 1.0),
    "expert_count": (0,),
    "expert_used_count": (0,),
    "final_logit_softcapping": (0.0,),
    "logit_scale": (0.0, 1.0),
    "pooling_type": (0,),
    "residual_scale": (0.0, 1.0),
    "rope.scaling.yarn_attn_factor": (1.0,),
    "rope.scaling.yarn_ext_factor": (1.0,),
    "use_parallel_residual": (False,),
}


def open_reader(path: Path) -> GGUFReader:
    """The file's keys and tensors, memory-mapped. Raises `UserError` where it cannot be read."""
    try:
        return GGUFReader(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, IndexError, KeyError, OverflowError) as error:
        # The library's own words for a file that ends early are about arrays.
        why = f"truncated, damaged or of another kind: {error}"
        why = LFS_POINTER if is_lfs_pointer(path) else why
        raise UserError(f"{path}: cannot be read as GGUF: {why}") from error


def open_file(path: Path) -> Weights:
    """The model in a GGUF file, memory-mapped; a tensor is dequantised when it is asked for."""
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    reader = open_reader(path)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    shapes = {name: tuple(int(n) for n in reversed(t.shape)) for name, t in tensors.items()}
    metadata = _Metadata(reader, str(path))
    config = _config(metadata, shapes, _rope_factors(tensors, path))
    found = {name: shape for name, shape in shapes.items() if name != _ROPE_FREQS}
    check_tensors(config, "gguf", found, path)
    fetch = _fetcher(tensors, config, metadata.architecture in _PAIRED, path)
    return Weights(config, stacked_reader(config, "gguf", fetch))


class _Metadata:
    """Typed access to the keys of the architecture; every error names the file and the key."""

    def __init__(self, reader: GGUFReader, where: str):
        self._fields = reader.fields
        self.where = where
        self.architecture = str(self.get("general.architecture"))
        if self.architecture not in _FAMILIES:
            raise UserError(
                f"{where}: architecture {self.architecture!r} is not supported; "
                f"accepted: {', '.join(_FAMILIES)}"
            )
        if self.get("split.count", 1) > 1:
            raise UserError(f"{where}: one part of a split model; merge the parts into one file")
        prefix = f"{self.architecture}."
        self.own = {
            key.removeprefix(prefix): self.get(key)
            for key in self._fields
            if key.startswith(prefix)
        }
        for key, value in self.own.items():
            if key not in _READ and value not in _NEUTRAL.get(key, ()):
                raise self.refuse(key, " or ".join(map(str, _NEUTRAL.get(key, ("no such key",)))))

    def get(self, key: str, default: Any = None) -> Any:
        field = self._fields.get(key)
        return default if field is None else field.contents()

    def refuse(self, key: str, accepted: str) -> UserError:
        found = self.own.get(key, "missing")
        return UserError(
            f"{self.where}: {self.architecture}.{key} ({found}) is not supported; "
            f"accepted: {accepted}"
        )

    def count(self, key: str, default: int | None = None) -> int:
        value = self.own.get(key, default)
        if type(value) is not int or value < 1:
            raise self.refuse(key, "one positive whole number for all layers")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A positive float32, as the shortest decimal that stands for it (1e-05, not 9.99…e-06)."""
        value: Any = self.own.get(key, default)
        if type(value) not in (int, float) or not math.isfinite(value) or value <= 0:
            raise self.refuse(key, "a positive number")
        return float(str(np.float32(value)))


def _config(
    metadata: _Metadata, shapes: dict[str, tuple[int, ...]], rope_factors: np.ndarray | None
) -> LlamaConfig:
    n_heads = metadata.count("attention.head_count")
    n_kv_heads = metadata.count("attention.head_count_kv", n_heads)
    if n_heads % n_kv_heads:
        raise metadata.refuse("attention.head_count_kv", f"a divisor of {n_heads} heads")
    d_model = metadata.count("embedding_length")
    head_dim = metadata.count("attention.key_length", d_model // n_heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if metadata.count(key, head_dim) != head_dim:
            raise metadata.refuse(key, f"the head size {head_dim}")
    max_positions = metadata.count("context_length")
    window = metadata.own.get("attention.sliding_window", 0)
    if window and window < max_positions:
        raise metadata.refuse("attention.sliding_window", f"0 or at least {max_positions}")
    if "token_embd.weight" not in shapes:
        raise UserError(f"{metadata.where}: token_embd.weight is missing")
    family = _FAMILIES[metadata.architecture]
    bos, eos = (metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos"))
    return LlamaConfig(
        vocab_size=shapes["token_embd.weight"][0],
        d_model=d_model,
        n_layers=metadata.count("block_count"),
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=head_dim,
        d_ff=metadata.count("feed_forward_length"),
        max_positions=max_positions,
        rope=_rope(metadata, head_dim, max_positions, rope_factors),
        norm_eps=metadata.number("attention.layer_norm_rms_epsilon"),
        tie_embeddings="output.weight" not in shapes,
        qkv_bias=family == "qwen2",
        qk_norm=family == "qwen3",
        family=family,
        bos_token_id=None if bos is None else int(bos),
        eos_token_ids=() if eos is None else (int(eos),),
    )


def _rope(
    metadata: _Metadata, head_dim: int, max_positions: int, factors: np.ndarray | None
) -> RopeConfig:
    theta = metadata.number("rope.freq_base", 10_000.0)
    kind = metadata.own.get("rope.scaling.type", "none")
    if factors is not None:
        if kind not in ("none", "linear") or metadata.number("rope.scaling.factor", 1.0) != 1.0:
            raise UserError(f"{metadata.where}: {_ROPE_FREQS} beside {kind} RoPE is not supported")
        return _rope_from_factors(theta, head_dim, factors, metadata.where)
    match kind:
        case "none":
            return RopeConfig(theta)
        case "linear":
            return RopeConfig(theta, "linear", metadata.number("rope.scaling.factor"))
        case "yarn":
            factor = metadata.number("rope.scaling.factor")
            # GGUF gives a multiple of YaRN's own scaling, ours is the scaling itself.
            multiple = metadata.number("rope.scaling.attn_factor", 1.0)
            return RopeConfig(
                theta,
                "yarn",
                factor,
                metadata.count("rope.scaling.original_context_length", max_positions),
                beta_fast=metadata.number("rope.scaling.yarn_beta_fast", 32.0),
                beta_slow=metadata.number("rope.scaling.yarn_beta_slow", 1.0),
                attention_factor=None
                if multiple == 1.0
                else multiple * (0.1 * math.log(factor) + 1.0),
            )
        case _:
            raise metadata.refuse("rope.scaling.type", "none, linear or yarn")


def _rope_factors(tensors: dict[str, ReaderTensor], path: Path) -> np.ndarray | None:
    """What each frequency is divided by, where the file says so."""
    if _ROPE_FREQS not in tensors:
        return None
    return _dequantised(tensors[_ROPE_FREQS], path).reshape(-1)


def _rope_from_factors(theta: float, head_dim: int, factors: np.ndarray, where: str) -> RopeConfig:
    """The `llama3` rule whose result `factors` are: low 1, high 4, an original length 2^n.

    Every published model that carries the tensor was made by that rule, with length 8,192.
    """
    default = RopeConfig(theta)
    candidates = [default] + [
        RopeConfig(theta, "llama3", float(factors.max()), 2**n) for n in range(5, 21)
    ]
    plain = inverse_frequencies(default, head_dim, 1)
    for rope in candidates:
        wanted = plain / inverse_frequencies(rope, head_dim, 1)
        if wanted.shape == factors.shape and np.allclose(wanted, factors, rtol=1e-4, atol=0):
            return rope
    raise UserError(
        f"{where}: {_ROPE_FREQS} does not follow the llama3 rule; no other is supported"
    )


def _fetcher(
    tensors: dict[str, ReaderTensor], config: LlamaConfig, paired: bool, path: Path
) -> Callable[[str], np.ndarray]:
    def fetch(name: str) -> np.ndarray:
        tensor = _dequantised(tensors[name], path)
        if paired and ".attn_q." in name:
            return _halves(tensor, config.n_heads)
        if paired and ".attn_k." in name:
            return _halves(tensor, config.n_kv_heads)
        return tensor

    return fetch


def _dequantised(tensor: ReaderTensor, path: Path) -> np.ndarray:
    try:
        return dequantize(tensor.data, tensor.tensor_type)
    except (NotImplementedError, ValueError) as error:
        raise UserError(f"{path}: tensor {tensor.name} cannot be dequantised: {error}") from error


def _halves(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows of each head from pairs (2i, 2i + 1) to halves (i, i + E/2)."""
    return rows.reshape(heads, -1, 2, rows.shape[-1]).swapaxes(1, 2).reshape(rows.shape)
