"""Reading GGUF files: dequantization, row order, config from metadata, and errors."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import jax.numpy as jnp
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Quant
from safetensors.numpy import load_file

from sat_jax.errors import UserError
from sat_jax.interop import load_model, open_weights
from sat_jax.models import registry
from sat_jax.nn.rope import RopeConfig, inverse_frequencies
from tests.tolerances import assert_close

GOLDEN = Path(__file__).parent / "golden"

# What the converters of llama.cpp write for the golden models.
METADATA: dict[str, Any] = {
    "block_count": 3,
    "context_length": 128,
    "embedding_length": 64,
    "feed_forward_length": 176,
    "attention.head_count": 8,
    "attention.head_count_kv": 2,
    "attention.layer_norm_rms_epsilon": 1e-5,
    "rope.freq_base": 10_000.0,
    "rope.dimension_count": 8,
    "vocab_size": 256,
}
QWEN_METADATA: dict[str, Any] = {
    "block_count": 2,
    "context_length": 64,
    "embedding_length": 32,
    "feed_forward_length": 48,
    "attention.head_count": 4,
    "attention.head_count_kv": 2,
    "attention.layer_norm_rms_epsilon": 1e-6,
    "rope.freq_base": 1_000_000.0,
}
HEADS = {"attn_q": 8, "attn_k": 2}


def pairs(rows: np.ndarray, heads: int) -> np.ndarray:
    """Each head's rows from halves to pairs, as the converter of llama.cpp does it."""
    halves = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
    return halves.swapaxes(1, 2).reshape(rows.shape)


def golden_tensors(name: str) -> dict[str, np.ndarray]:
    """The tensors of a golden model under the names and in the row order of GGUF."""
    stored = load_file(GOLDEN / name / "model.safetensors")
    tensors = {}
    for tensor in registry.MODEL_TYPES["llama"].tensors:
        for layer in range(3):
            source, target = (
                tensor.stored(form).name.format(layer=layer) for form in ("huggingface", "gguf")
            )
            if source in stored:
                tensors[target] = stored[source]
    if name.startswith("llama"):
        for target, tensor in tensors.items():
            heads = HEADS.get(target.split(".")[-2])
            if heads:
                tensors[target] = pairs(tensor, heads)
    return tensors


def write(
    path: Path,
    tensors: dict[str, np.ndarray],
    metadata: dict[str, Any],
    architecture: str = "llama",
    quant: Callable[[str, np.ndarray], Quant] = lambda *_: Quant.F32,
) -> Path:
    """A GGUF file; `quant` chooses each tensor's type."""
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in metadata.items():
        name = f"{architecture}.{key}"
        match value:
            case bool():
                writer.add_bool(name, value)
            case int():
                writer.add_uint32(name, value)
            case float():
                writer.add_float32(name, value)
            case str():
                writer.add_string(name, value)
            case _:
                writer.add_array(name, value)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    for name, tensor in tensors.items():
        kind = quant(name, tensor)
        writer.add_tensor(name, gguf.quants.quantize(tensor, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write(tmp_path / "model.gguf", golden_tensors("llama_gqa"), METADATA)


def test_a_llama_file_is_the_same_model(file: Path) -> None:
    original, read = open_weights(GOLDEN / "llama_gqa"), open_weights(file)
    assert read.config == original.config
    for path in original.paths:
        assert_close(read.read(path), original.read(path), "float32", "exact")
    golden = np.load(GOLDEN / "llama_gqa" / "reference.npz")
    logits = load_model(file)(jnp.asarray(golden["input_ids"]))
    assert_close(logits, golden["logits"], "float32", "forward")


def test_rows_go_from_pairs_to_halves(tmp_path: Path) -> None:
    """Against rows, rotations and scores that were computed elsewhere."""
    layout = np.load(GOLDEN / "llama_gqa" / "qk_layout.npz")
    tensors = golden_tensors("llama_gqa")
    for name in ("q", "k"):
        tensors[f"blk.0.attn_{name}.weight"] = layout[f"{name}_proj_pairs"]
    weights = open_weights(write(tmp_path / "model.gguf", tensors, METADATA))
    for name, path in (("q", "query"), ("k", "key")):
        rows = weights.read(f"layers/attention/{path}")[0].reshape(-1, 64)
        assert_close(rows, layout[f"{name}_proj_halves"], "float32", "exact")


@pytest.mark.parametrize("name", ["qwen2", "qwen3"])
def test_qwen_rows_are_not_permuted(name: str, tmp_path: Path) -> None:
    metadata = dict(QWEN_METADATA)
    if name == "qwen3":
        metadata |= {"attention.key_length": 12, "attention.value_length": 12}
    file = write(tmp_path / "model.gguf", golden_tensors(name), metadata, name)
    original, read = open_weights(GOLDEN / name), open_weights(file)
    assert read.config == original.config
    for path in original.paths:
        assert_close(read.read(path), original.read(path), "float32", "exact")


def test_tied_embeddings(tmp_path: Path) -> None:
    metadata = METADATA | {"attention.head_count_kv": 8}
    tensors = golden_tensors("llama_tied")
    weights = open_weights(write(tmp_path / "model.gguf", tensors, metadata))
    assert weights.config.tie_embeddings
    assert "lm_head" not in weights.paths


@pytest.mark.parametrize(
    ("kind", "step"),
    [
        (Quant.F16, 2**-11),
        (Quant.BF16, 2**-8),
        (Quant.Q8_0, 1 / 200),
        (Quant.Q5_0, 1 / 16),
        (Quant.Q4_1, 1 / 15),
        (Quant.Q4_0, 1 / 8),
    ],
)
def test_quantized_tensors(kind: Quant, step: float, tmp_path: Path) -> None:
    """Within one step of the largest of a block, and exactly what the file holds."""

    def choose(_: str, tensor: np.ndarray) -> Quant:
        return kind if tensor.ndim == 2 and tensor.shape[1] % 32 == 0 else Quant.F32

    tensors = golden_tensors("llama_gqa")
    read = open_weights(write(tmp_path / "model.gguf", tensors, METADATA, quant=choose))
    original = open_weights(GOLDEN / "llama_gqa")
    for path in ("embed", "layers/attention/query", "layers/attention/output", "layers/mlp/up"):
        found, wanted = read.read(path), original.read(path)
        assert not np.array_equal(found, wanted), path
        assert np.abs(found - wanted).max() <= step * np.abs(wanted).max(), path
    rounded = gguf.quants.dequantize(gguf.quants.quantize(tensors["token_embd.weight"], kind), kind)
    assert_close(read.read("embed"), rounded, "float32", "exact")


def llama3_factors(rope: RopeConfig) -> np.ndarray:
    """Return what a converter stores: the factor that divides each frequency."""
    plain = inverse_frequencies(RopeConfig(rope.theta), 8, 1)
    return (plain / inverse_frequencies(rope, 8, 1)).astype(np.float32)


@pytest.mark.parametrize(
    "rope",
    [
        RopeConfig(10_000.0, "llama3", 8.0, 32),
        RopeConfig(10_000.0, "llama3", 32.0, 8192),
        RopeConfig(10_000.0),
    ],
)
def test_rope_factors_become_the_llama3_rule(rope: RopeConfig, tmp_path: Path) -> None:
    tensors = golden_tensors("llama_gqa") | {"rope_freqs.weight": llama3_factors(rope)}
    read = open_weights(write(tmp_path / "model.gguf", tensors, METADATA)).config.rope
    assert_close(llama3_factors(read), llama3_factors(rope), "float32", "forward")
    assert read.type == rope.type


@pytest.mark.parametrize("factors", [[1.0, 2.0, 1.0, 8.0], [1.0, 1.0], [2.0, 2.0, 2.0, 2.0]])
def test_other_rope_factors_are_refused(factors: list[float], tmp_path: Path) -> None:
    tensors = golden_tensors("llama_gqa") | {"rope_freqs.weight": np.float32(factors)}
    with pytest.raises(UserError, match=r"rope_freqs\.weight does not follow the llama3 rule"):
        open_weights(write(tmp_path / "model.gguf", tensors, METADATA))


YARN = {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0}


@pytest.mark.parametrize(
    ("keys", "rope"),
    [
        ({"rope.scaling.type": "none"}, RopeConfig(10_000.0)),
        (
            {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0},
            RopeConfig(10_000.0, "linear", 4.0),
        ),
        (
            YARN | {"rope.scaling.original_context_length": 32},
            RopeConfig(10_000.0, "yarn", 4.0, 32),
        ),
        (
            YARN | {"rope.scaling.attn_factor": 2.0, "rope.scaling.yarn_beta_fast": 16.0},
            RopeConfig(
                10_000.0,
                "yarn",
                4.0,
                128,
                beta_fast=16.0,
                attention_factor=2 * (0.1 * np.log(4) + 1),
            ),
        ),
    ],
)
def test_rope_scaling(keys: dict[str, Any], rope: RopeConfig, tmp_path: Path) -> None:
    tensors = golden_tensors("llama_gqa")
    file = write(tmp_path / "model.gguf", tensors, METADATA | keys)
    assert open_weights(file).config.rope == rope


def test_scaled_rope_from_a_file(tmp_path: Path) -> None:
    """The tensor of factors gives the logits of the llama3 scaling it was made from."""
    scaled = np.load(GOLDEN / "llama_gqa" / "rope_scaled.npz")
    settings = json.loads((GOLDEN / "llama_gqa" / "rope_scaled.json").read_text())["llama3"]
    rope = settings["rope_parameters"]
    original = rope["original_max_position_embeddings"]
    factors = llama3_factors(RopeConfig(rope["rope_theta"], "llama3", rope["factor"], original))
    tensors = golden_tensors("llama_gqa") | {"rope_freqs.weight": factors}
    model = load_model(write(tmp_path / "model.gguf", tensors, METADATA))
    logits = model(jnp.asarray(scaled["input_ids"]))
    assert_close(logits, scaled["logits_llama3"], "float32", "forward")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"attention.sliding_window": 32}, r"llama\.attention\.sliding_window \(32\)"),
        ({"attention.head_count": [8, 8, 4]}, r"attention\.head_count \(\[8, 8, 4\]\)"),
        ({"attention.head_count_kv": 3}, r"attention\.head_count_kv \(3\)"),
        ({"attention.value_length": 16}, r"attention\.value_length \(16\)"),
        ({"rope.dimension_count": 4}, r"rope\.dimension_count \(4\)"),
        ({"rope.scaling.type": "longrope"}, r"rope\.scaling\.type \(longrope\)"),
        ({"rope.scaling.type": "linear"}, r"rope\.scaling\.factor \(missing\)"),
        ({"expert_count": 8}, r"expert_count \(8\)"),
        ({"final_logit_softcapping": 30.0}, r"final_logit_softcapping \(30\.0\)"),
        ({"attention.causal": False}, r"attention\.causal \(False\)"),
        ({"some.new_feature": 1}, r"llama\.some\.new_feature \(1\)"),
        ({"embedding_length": 0}, r"embedding_length \(0\)"),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(
    change: dict[str, Any], named: str, tmp_path: Path
) -> None:
    tensors = golden_tensors("llama_gqa")
    file = write(tmp_path / "model.gguf", tensors, METADATA | change)
    with pytest.raises(UserError, match=named) as caught:
        open_weights(file)
    assert str(caught.value).startswith(f"{file}: ")
    assert "\n" not in str(caught.value)


def test_neutral_settings_are_accepted(tmp_path: Path) -> None:
    neutral = {"attention.sliding_window": 128, "expert_count": 0, "attention.causal": True}
    file = write(tmp_path / "model.gguf", golden_tensors("llama_gqa"), METADATA | neutral)
    assert open_weights(file).config == open_weights(GOLDEN / "llama_gqa").config


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"endianess": gguf.GGUFEndian.BIG}, "a big-endian file; accepted: .*little-endian"),
        ({"type": "adapter"}, "general.type 'adapter'; accepted: model"),
        ({"quantization_version": 1}, "general.quantization_version 1; accepted: 2"),
    ],
)
def test_other_headers_are_refused(settings: dict[str, Any], problem: str, tmp_path: Path) -> None:
    order = settings.pop("endianess", gguf.GGUFEndian.LITTLE)
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama", endianess=order)
    for name, value in settings.items():
        getattr(writer, f"add_{name}")(value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(UserError, match=problem):
        open_weights(tmp_path / "model.gguf")


def test_metadata_that_is_not_text(file: Path) -> None:
    content = file.read_bytes()
    position = content.index(b"llama", content.index(b"general.architecture"))
    file.write_bytes(content[:position] + b"\xff" + content[position + 1 :])
    with pytest.raises(UserError, match=r"general\.architecture is not UTF-8"):
        open_weights(file)


def test_another_architecture_is_refused(tmp_path: Path) -> None:
    file = write(tmp_path / "model.gguf", {"token_embd.weight": np.ones((4, 4))}, {}, "gemma2")
    with pytest.raises(UserError, match="'gemma2' is not supported; accepted: llama, qwen2, qwen3"):
        open_weights(file)


def test_tensors_that_do_not_fit_are_named(tmp_path: Path) -> None:
    tensors = golden_tensors("llama_gqa")
    norm = tensors.pop("blk.1.attn_norm.weight")
    with pytest.raises(UserError, match=r"blk\.1\.attn_norm\.weight is missing"):
        open_weights(write(tmp_path / "a.gguf", tensors, METADATA))
    tensors |= {"blk.1.attn_norm.weight": norm, "blk.0.attn_q.bias": np.ones(64, np.float32)}
    with pytest.raises(UserError, match=r"blk\.0\.attn_q\.bias is no parameter"):
        open_weights(write(tmp_path / "b.gguf", tensors, METADATA))
    del tensors["blk.0.attn_q.bias"]
    tensors["blk.1.attn_norm.weight"] = np.ones(32, np.float32)
    with pytest.raises(UserError, match=r"attn_norm\.weight has shape \[32\], expected \[64\]"):
        open_weights(write(tmp_path / "c.gguf", tensors, METADATA))


@pytest.mark.parametrize("size", [0, 3, 20, 200, 1000, -1000])
def test_truncated_files(size: int, file: Path) -> None:
    """Cut inside the header, the metadata, the list of tensors or the tensors themselves."""
    content = file.read_bytes()
    file.write_bytes(content[:size])
    with pytest.raises(UserError, match=r"model\.gguf: cannot be read as GGUF: truncated"):
        open_weights(file)


def test_files_that_are_not_gguf(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"version https://git-lfs.github.com/spec/v1\n" * 10)
    with pytest.raises(UserError, match="cannot be read as GGUF: a Git LFS pointer"):
        open_weights(file)
