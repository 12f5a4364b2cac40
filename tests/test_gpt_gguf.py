"""GGUF files of GPT-2 and GPT-NeoX, written as llama.cpp's converter does."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sat_jax.errors import UserError
from sat_jax.interop import open_weights
from tests.gpt_families import GOLDEN, stored
from tests.test_gguf import write
from tests.tolerances import assert_close

# What the converters of llama.cpp write for the golden models.
METADATA: dict[str, Any] = {
    "block_count": 3,
    "context_length": 64,
    "embedding_length": 64,
    "feed_forward_length": 256,
    "attention.layer_norm_epsilon": 1e-5,
}
GPT2_METADATA = METADATA | {"attention.head_count": 8}
NEOX_METADATA = METADATA | {
    "attention.head_count": 4,
    "rope.dimension_count": 4,
    "use_parallel_residual": True,
}
GGUF_NAMES = {
    "transformer.wte": "token_embd",
    "transformer.wpe": "position_embd",
    "transformer.ln_f": "output_norm",
    "ln_1": "attn_norm",
    "ln_2": "ffn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
    "gpt_neox.embed_in": "token_embd",
    "embed_out": "output",
    "gpt_neox.final_layer_norm": "output_norm",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "attention.query_key_value": "attn_qkv",
    "attention.dense": "attn_output",
    "mlp.dense_h_to_4h": "ffn_up",
    "mlp.dense_4h_to_h": "ffn_down",
}


def gguf_tensors(name: str) -> dict[str, np.ndarray]:
    """Convert a golden model as llama.cpp's converter does."""
    tensors = {}
    for source, tensor in stored(name).items():
        module, _, kind = source.rpartition(".")
        parts = module.split(".")
        block = ""
        if len(parts) > 3:
            block, module = f"blk.{parts[2]}.", ".".join(parts[3:])
        if ".c_" in module and kind == "weight":
            tensor = tensor.T
        if module == "attention.query_key_value":
            heads = tensor.reshape(4, 3, 16, *tensor.shape[1:])
            tensor = heads.swapaxes(0, 1).reshape(tensor.shape)
        tensors[f"{block}{GGUF_NAMES[module]}.{kind}"] = np.ascontiguousarray(tensor)
    return tensors


@pytest.mark.parametrize(
    ("name", "architecture", "metadata"),
    [("gpt2", "gpt2", GPT2_METADATA), ("gpt_neox", "gptneox", NEOX_METADATA)],
)
def test_a_gguf_file_is_the_same_model(
    name: str, architecture: str, metadata: dict[str, Any], tmp_path: Path
) -> None:
    file = write(tmp_path / "model.gguf", gguf_tensors(name), metadata, architecture)
    original, read = open_weights(GOLDEN / name), open_weights(file)
    tokens = {"bos_token_id": 1, "eos_token_ids": (2,)}
    assert read.config == dataclasses.replace(original.config, **tokens)
    for path in original.paths:
        assert_close(read.read(path), original.read(path), "float32", "exact")


def test_a_gguf_head_of_its_own(tmp_path: Path) -> None:
    head = np.ones((256, 64), np.float32)
    tensors = gguf_tensors("gpt2") | {"output.weight": head}
    weights = open_weights(write(tmp_path / "model.gguf", tensors, GPT2_METADATA, "gpt2"))
    assert not weights.config.tie_embeddings
    assert_close(weights.read("lm_head"), head, "float32", "exact")


@pytest.mark.parametrize(
    ("name", "architecture", "metadata", "named"),
    [
        ("gpt2", "gpt2", GPT2_METADATA | {"attention.head_count_kv": 2}, "head_count_kv"),
        ("gpt2", "gpt2", GPT2_METADATA | {"attention.head_count": 7}, "head_count"),
        ("gpt2", "gpt2", GPT2_METADATA | {"rope.freq_base": 10.0}, "rope.freq_base"),
        ("gpt_neox", "gptneox", NEOX_METADATA | {"rope.dimension_count": 5}, "dimension_count"),
        ("gpt_neox", "gptneox", NEOX_METADATA | {"rope.dimension_count": 18}, "dimension_count"),
        ("gpt_neox", "gptneox", METADATA | {"attention.head_count": 4}, "use_parallel_residual"),
    ],
)
def test_gguf_keys_that_are_refused(
    name: str, architecture: str, metadata: dict[str, Any], named: str, tmp_path: Path
) -> None:
    file = write(tmp_path / "model.gguf", gguf_tensors(name), metadata, architecture)
    with pytest.raises(UserError, match=named):
        open_weights(file)
