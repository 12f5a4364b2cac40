"""Writing GGUF files: values and types of tensors, metadata, sizes, and errors."""

import dataclasses
from collections import Counter
from pathlib import Path
from typing import Any, get_args

import gguf
import jax.numpy as jnp
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Quant
from gguf.quants import dequantize

from sat_jax.errors import UserError
from sat_jax.interop import load_model, open_weights
from sat_jax.interop.gguf_writer import TensorType, write_file
from sat_jax.interop.weights import Weights
from sat_jax.models.gpt2 import GPT2Config
from sat_jax.models.gpt_neox import GPTNeoXConfig
from sat_jax.models.llama import LlamaConfig
from sat_jax.nn.rope import RopeConfig, attention_scaling, inverse_frequencies
from tests.small_models import random_params
from tests.test_gguf import METADATA, golden_tensors, write
from tests.test_gpt_gguf import GPT2_METADATA, NEOX_METADATA, gguf_tensors
from tests.tolerances import assert_close

GOLDEN = Path(__file__).parent / "golden"
SIZES: dict[str, Any] = {
    "vocab_size": 32,
    "d_model": 32,
    "n_layers": 1,
    "n_heads": 2,
    "d_ff": 64,
    "max_positions": 64,
    "bos_token_id": 1,
    "eos_token_ids": (2,),
}
SMALL = LlamaConfig(**SIZES, n_kv_heads=1, head_dim=16)


def small_weights(config: Any = SMALL) -> Weights:
    return Weights(config, random_params(config).__getitem__)


def written(path: Path, name: str, tensor_type: TensorType) -> gguf.GGUFReader:
    """Write a golden model and open the file with the library."""
    write_file(path, open_weights(GOLDEN / name), tensor_type)
    return gguf.GGUFReader(path)


def values(reader: gguf.GGUFReader) -> dict[str, np.ndarray]:
    return {t.name: dequantize(t.data, t.tensor_type) for t in reader.tensors}


def types(reader: gguf.GGUFReader) -> dict[str, str]:
    return {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}


@pytest.mark.parametrize("name", ["llama_gqa", "llama_tied", "mistral", "qwen2", "qwen3"])
def test_f32_is_the_same_llama(name: str, tmp_path: Path) -> None:
    file, original = tmp_path / "model.gguf", open_weights(GOLDEN / name)
    write_file(file, original, "F32")
    read = open_weights(file)
    family = "llama" if name == "mistral" else original.config.family
    assert read.config == dataclasses.replace(original.config, family=family)
    for path in original.paths:
        assert_close(read.read(path), original.read(path), "float32", "exact")


@pytest.mark.parametrize(
    ("name", "architecture", "metadata"),
    [
        ("llama_gqa", "llama", METADATA),
        ("gpt2", "gpt2", GPT2_METADATA | {"vocab_size": 256}),
        ("gpt_neox", "gptneox", NEOX_METADATA | {"vocab_size": 256, "rope.freq_base": 10_000.0}),
    ],
)
def test_f32_is_the_file_of_the_converter(
    name: str, architecture: str, metadata: dict[str, Any], tmp_path: Path
) -> None:
    """Names, order of rows and metadata, against the ones that other tests convert by hand."""
    reader = written(tmp_path / "model.gguf", name, "F32")
    expected = golden_tensors(name) if name == "llama_gqa" else gguf_tensors(name)
    found = values(reader)
    assert found.keys() == expected.keys()
    for tensor, value in expected.items():
        assert_close(found[tensor], value, "float32", "exact")
    prefix = f"{architecture}."
    keys = {key: field.contents() for key, field in reader.fields.items()}
    assert keys["general.architecture"] == architecture
    own = {k.removeprefix(prefix): value for k, value in keys.items() if k.startswith(prefix)}
    assert own == pytest.approx(metadata)


# Of llama_gqa: 256 tokens, width 64, 3 layers, q and o 64 rows, k and v 16, MLP 176 channels. Rows
# of 176 values (down) are no blocks of 32, which have 34 bytes in Q8_0, 18 in Q4_0 and 20 in Q4_1.
# Bytes: embedding, head, the layers, the last norm.
DOWN_AND_NORMS = 64 * 176 * 2 + 2 * 64 * 4
BYTES: dict[TensorType, int] = {
    "F32": 661_248,  # 4 · 165,312
    "F16": 331_520,  # 2 · 164,864 + 4 · 448
    "Q8_0": 17_408 + 17_408 + 3 * (34_816 + DOWN_AND_NORMS) + 256,
    "Q4_0": 9_216 + 17_408 + 3 * (18_432 + DOWN_AND_NORMS) + 256,
    "Q4_1": 10_240 + 17_408 + 3 * (20_480 + DOWN_AND_NORMS) + 256,
}


@pytest.mark.parametrize("tensor_type", get_args(TensorType))
def test_sizes_by_hand(tensor_type: TensorType, tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    reader = written(file, "llama_gqa", tensor_type)
    assert file.stat().st_size - reader.data_offset == BYTES[tensor_type]
    prefix = "ALL" if tensor_type == "F32" else "MOSTLY"
    file_type = reader.fields["general.file_type"].contents()
    assert gguf.LlamaFileType(file_type).name == f"{prefix}_{tensor_type}"


def test_f16_rounds_matrices_only(tmp_path: Path) -> None:
    found = values(written(tmp_path / "model.gguf", "gpt2", "F16"))
    for name, value in gguf_tensors("gpt2").items():
        if value.ndim == 2 and name != "position_embd.weight":
            value = value.astype(np.float16).astype(np.float32)
        assert_close(found[name], value, "float32", "exact")


def test_q8_is_within_half_a_step(tmp_path: Path) -> None:
    """A step is a 127th of the largest value of a block; its float16 is off by 2^-11 at most."""
    reader = written(tmp_path / "model.gguf", "llama_gqa", "Q8_0")
    kinds, found = types(reader), values(reader)
    for name, value in golden_tensors("llama_gqa").items():
        if kinds[name] == "Q8_0":
            blocks = value.reshape(-1, 32)
            step = np.abs(blocks).max(1, keepdims=True) / 127
            error = np.abs(found[name].reshape(-1, 32) - blocks)
            assert (error <= step * (0.5 + 127 * 2.0**-11)).all(), name
            assert (error > 0.25 * step).any(), name


@pytest.mark.parametrize(
    ("tensor_type", "grid"),
    [
        ("Q8_0", np.arange(-127, 128) / 8),
        ("Q4_0", np.arange(-8, 8) / 2),
        ("Q4_1", np.arange(16) / 4 - 1),
    ],
)
def test_values_on_the_grid_of_a_type_are_exact(
    tensor_type: TensorType, grid: np.ndarray, tmp_path: Path
) -> None:
    """Blocks that contain the ends of a grid, whose step a float16 can represent; and zeros."""
    rng, params = np.random.default_rng(0), dict(random_params(SMALL))
    gate = rng.choice(grid, params["layers/mlp/gate"].shape).astype(np.float32)
    gate[..., 0], gate[..., 1] = grid[0], grid[-1]
    gate[:, 5] = 0.0
    params["layers/mlp/gate"] = gate
    write_file(tmp_path / "a.gguf", Weights(SMALL, params.__getitem__), tensor_type)
    read = open_weights(tmp_path / "a.gguf")
    assert_close(read.read("layers/mlp/gate"), gate, "float32", "exact")
    assert read.quantized == tuple(sorted({tensor_type, "Q8_0"}))


@pytest.mark.parametrize("tensor_type", ["Q8_0", "Q4_0", "Q4_1"])
def test_types_and_values_are_those_of_another_writer(
    tensor_type: TensorType, tmp_path: Path
) -> None:
    def kind(name: str, tensor: np.ndarray) -> Quant:
        if tensor.ndim == 1:
            return Quant.F32
        if name == "output.weight":
            return Quant.Q8_0
        return Quant.F16 if name.endswith("ffn_down.weight") else Quant[tensor_type]

    tensors = golden_tensors("llama_gqa")
    other = write(tmp_path / "other.gguf", tensors, METADATA, quant=kind)
    reader = written(tmp_path / "model.gguf", "llama_gqa", tensor_type)
    assert types(reader) == types(gguf.GGUFReader(other))
    for name, value in values(gguf.GGUFReader(other)).items():
        np.testing.assert_array_equal(values(reader)[name], value)
    if tensor_type == "Q4_1":
        tokens = jnp.arange(16)[None]
        logits = load_model(tmp_path / "model.gguf")(tokens)
        assert_close(logits, load_model(other)(tokens), "float32", "exact")


def test_a_tied_embedding_is_the_head(tmp_path: Path) -> None:
    assert types(written(tmp_path / "a.gguf", "llama_tied", "Q4_0"))["token_embd.weight"] == "Q8_0"
    gpt2 = types(written(tmp_path / "b.gguf", "gpt2", "Q4_1"))
    assert gpt2["token_embd.weight"] == "Q8_0"
    assert gpt2["position_embd.weight"] == "F32"
    neox = types(written(tmp_path / "c.gguf", "gpt_neox", "Q4_1"))
    assert Counter(neox.values()) == {"Q4_1": 1 + 3 * 4, "Q8_0": 1, "F32": 2 + 3 * 8}


@pytest.mark.parametrize(
    "rope",
    [
        RopeConfig(500_000.0),
        RopeConfig(10_000.0, "linear", 4.0),
        RopeConfig(10_000.0, "yarn", 4.0, 16),
        RopeConfig(10_000.0, "yarn", 4.0, 16, beta_fast=16.0, attention_factor=1.5),
        RopeConfig(10_000.0, "llama3", 8.0, 32),
    ],
)
def test_rope(rope: RopeConfig, tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    write_file(file, small_weights(dataclasses.replace(SMALL, rope=rope)), "F32")
    read = open_weights(file).config.rope
    assert read is not None and read.type == rope.type
    ratios = inverse_frequencies(read, 16, 1) / inverse_frequencies(rope, 16, 1)
    assert_close(ratios, np.ones(8), "float32", "forward")
    assert attention_scaling(read, 1) == pytest.approx(attention_scaling(rope, 1))


NTK = RopeConfig(10_000.0, "ntk", 4.0)
YARN = RopeConfig(10_000.0, "yarn", 4.0, 64, truncate=False)
LLAMA3 = RopeConfig(10_000.0, "llama3", 8.0, 32)


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        (dataclasses.replace(SMALL, rope=NTK), "GGUF has no rope type 'ntk'; accepted: default, "),
        (dataclasses.replace(SMALL, rope=YARN), r"'llama' cannot express rope = .*truncate=False"),
        (dataclasses.replace(SMALL, qkv_bias=True), "'llama' cannot express qkv_bias = True"),
        (GPT2Config(**SIZES, activation="gelu"), "'gpt2' cannot express activation = 'gelu'"),
        (GPTNeoXConfig(**SIZES, rotary_fraction=1.0, rope=LLAMA3), "'gptneox' cannot .*'llama3'"),
    ],
)
def test_what_gguf_cannot_express_is_refused_by_name(
    config: Any, problem: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=problem) as caught:
        write_file(tmp_path / "model.gguf", small_weights(config), "F32")
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_retnet_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"type 'retnet' cannot be .*; accepted: llama, mistral,"):
        write_file(tmp_path / "model.gguf", open_weights(GOLDEN / "retnet"), "Q8_0")


def test_a_file_is_never_overwritten(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_text("mine")
    unread = Weights(SMALL, pytest.fail)
    with pytest.raises(UserError, match=r"model\.gguf: exists already; accepted: a new file"):
        write_file(file, unread, "F32")
    assert file.read_text() == "mine"
    with pytest.raises(UserError, match=r"accepted: the name of a file that ends in \.gguf"):
        write_file(tmp_path / "model.bin", small_weights(), "F32")
    with pytest.raises(UserError, match="'Q6_K'; accepted: F32, F16, Q8_0, Q4_0, Q4_1"):
        write_file(tmp_path / "b.gguf", small_weights(), "Q6_K")  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [70_000.0, -np.inf, np.nan])
def test_values_that_float16_lacks_are_refused(value: float, tmp_path: Path) -> None:
    """Nothing is left behind, though most of the file was written."""
    params = dict(random_params(SMALL))
    params["layers/mlp/down"] = np.full_like(params["layers/mlp/down"], value)
    weights = Weights(SMALL, params.__getitem__)
    for tensor_type in ("F16", "Q8_0", "Q4_1"):
        with pytest.raises(UserError, match=r"tensor blk\.0\.ffn_down\.weight has a value of"):
            write_file(tmp_path / "model.gguf", weights, tensor_type)
    assert not list(tmp_path.iterdir())
    write_file(tmp_path / "model.gguf", weights, "F32")


def test_zeros_of_a_pruned_model(tmp_path: Path) -> None:
    params = dict(random_params(SMALL))
    gate = params["layers/mlp/gate"].copy()
    zeros = np.random.default_rng(0).random(gate.shape) < 0.5
    gate[zeros] = 0.0
    params["layers/mlp/gate"] = gate
    for tensor_type in get_args(TensorType):
        file = tmp_path / f"{tensor_type}.gguf"
        write_file(file, Weights(SMALL, params.__getitem__), tensor_type)
        stay = not open_weights(file).read("layers/mlp/gate")[zeros].any()
        assert stay == (tensor_type != "Q4_1")


def test_values_near_zero(tmp_path: Path) -> None:
    params = dict(random_params(SMALL))
    gate = params["layers/mlp/gate"] = np.zeros_like(params["layers/mlp/gate"])
    gate[..., ::2] = 1e-38
    for tensor_type in ("Q8_0", "Q4_0", "Q4_1"):
        file = tmp_path / f"{tensor_type}.gguf"
        write_file(file, Weights(SMALL, params.__getitem__), tensor_type)
        assert not open_weights(file).read("layers/mlp/gate").any()


def test_a_quantized_model_is_not_quantized_again(tmp_path: Path) -> None:
    write_file(tmp_path / "q4.gguf", small_weights(), "Q4_0")
    source = open_weights(tmp_path / "q4.gguf")
    problem = r"quantized already \(Q4_0, Q8_0\) cannot be quantized to Q8_0; accepted: F32 and F16"
    with pytest.raises(UserError, match=problem):
        write_file(tmp_path / "q8.gguf", source, "Q8_0")
    write_file(tmp_path / "f32.gguf", source, "F32")
    wide = open_weights(tmp_path / "f32.gguf")
    assert wide.quantized == ()
    for path in source.paths:
        assert_close(wide.read(path), source.read(path), "float32", "exact")


def test_special_tokens_of_the_config(tmp_path: Path) -> None:
    """GGUF has two tokens that end a text."""
    config = dataclasses.replace(SMALL, eos_token_ids=(2, 5, 6))
    write_file(tmp_path / "a.gguf", small_weights(config), "F32")
    assert open_weights(tmp_path / "a.gguf").config.eos_token_ids == (2, 5)
    tokenizer = {"tokenizer.ggml.eos_token_id": 5, "tokenizer.ggml.model": "none"}
    write_file(tmp_path / "b.gguf", small_weights(config), "F32", tokenizer)
    assert open_weights(tmp_path / "b.gguf").config.eos_token_ids == (5, 2)
