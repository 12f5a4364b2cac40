"""Hugging Face directories: round trips, and errors that name what does not fit."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from sat_jax.errors import UserError
from sat_jax.interop import locate, open_weights
from sat_jax.interop.huggingface_config import config_from_json, config_to_json
from sat_jax.models.llama import LlamaConfig
from sat_jax.models.presets import preset
from sat_jax.nn.rope import RopeConfig
from tests.tolerances import assert_close

GOLDEN = Path(__file__).parent / "golden"
ALL = ("llama_mha", "llama_gqa", "llama_tied", "qwen2", "qwen3", "mistral")


def test_float64_tensors(copied: Path) -> None:
    damage(copied, {NORM: np.full(64, 0.1)})
    norm = open_weights(copied).read("layers/attention_norm")
    assert_close(norm[1], np.full(64, np.float32(0.1)), "float32", "exact")
    damage(copied, {NORM: np.full(64, 1e39)})
    with pytest.raises(UserError, match=f"tensor {NORM} has the value 1e.39, which float32 cannot"):
        open_weights(copied).read("layers/attention_norm")


SMALL: dict[str, Any] = {"vocab_size": 32, "d_model": 16, "n_layers": 2, "n_heads": 4, "d_ff": 48}
SMALL |= {"n_kv_heads": 2, "head_dim": 4, "max_positions": 64}
ROPES = [
    RopeConfig(5e5),
    RopeConfig(1e4, "linear", 4.0),
    RopeConfig(1e4, "dynamic", 2.0, 4096),
    RopeConfig(1e6, "yarn", 4.0, 1024, attention_factor=1.5, truncate=False),
    RopeConfig(1e6, "yarn", 4.0, 1024, beta_fast=16.0, beta_slow=2.0),
    RopeConfig(5e5, "llama3", 8.0, 1024, low_freq_factor=1.5, high_freq_factor=3.0),
]


@pytest.mark.parametrize("rope", ROPES, ids=lambda rope: rope.type)
@pytest.mark.parametrize("form", ["old", "new", "both"])
def test_either_form_of_config_is_complete(rope: RopeConfig, form: str) -> None:
    """transformers 4 reads rope_theta and rope_scaling, transformers 5 rope_parameters."""
    config = LlamaConfig(**SMALL | {"max_positions": 4096, "rope": rope, "eos_token_ids": (3, 4)})
    raw = config_to_json(config, "float32")
    if form == "old":
        del raw["rope_parameters"], raw["dtype"]
    elif form == "new":
        del raw["rope_theta"], raw["rope_scaling"], raw["torch_dtype"]
    assert config_from_json(raw, "config.json") == config


def test_the_oldest_configs() -> None:
    """KV heads, head size, RoPE base and tying have the defaults of transformers."""
    raw = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 32,
        "hidden_size": 16,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-6,
        "rope_scaling": {"type": "linear", "factor": 2.0},
        "pretraining_tp": 2,
    }
    expected = LlamaConfig(
        **SMALL | {"n_kv_heads": 4, "rope": RopeConfig(1e4, "linear", 2.0), "norm_eps": 1e-6}
    )
    assert config_from_json(raw, "config.json") == expected


LLAMA = config_to_json(preset("llama-3.1-8b"), "bfloat16")
QWEN2 = config_to_json(preset("qwen2-0.5b"), "bfloat16")
QWEN3 = config_to_json(preset("qwen3-0.6b"), "bfloat16")
MISTRAL = config_to_json(preset("mistral-7b"), "bfloat16")
WINDOW = {"sliding_window": 64, "use_sliding_window": True}
NESTED = {"full_attention": {"rope_theta": 1e4}}
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 9}
PARTIAL = {"partial_rotary_factor": 0.5}
OLD = {"rope_parameters": None}
NEW = {"rope_scaling": None}


@pytest.mark.parametrize(
    ("raw", "change", "named"),
    [
        (MISTRAL, {"sliding_window": 4096}, "sliding_window = 4096"),
        (QWEN2, WINDOW | {"max_window_layers": 9}, "sliding_window = 64"),
        (QWEN3, {"layer_types": ["full_attention", "sliding_attention"] * 14}, "layer_types"),
        (LLAMA, {"attention_bias": True}, "attention_bias = true"),
        (QWEN3, {"attention_bias": True}, "attention_bias = true"),
        (LLAMA, {"mlp_bias": True}, "mlp_bias = true"),
        (LLAMA, PARTIAL, "partial_rotary_factor = 0.5"),
        (LLAMA, {"hidden_act": "gelu"}, 'hidden_act = "gelu"'),
        (LLAMA, {"rope_interleaved": True}, "rope_interleaved = true"),
        (LLAMA, {"quantization_config": {"bits": 4}}, "quantization_config"),
        (LLAMA, {"model_type": "gemma2"}, 'model_type = "gemma2".*llama, mistral, qwen2, qwen3'),
        (LLAMA, {"model_type": None}, "model_type = null"),
        (LLAMA, {"architectures": ["LlamaForSequenceClassification"]}, "architectures"),
        (LLAMA, {"hidden_size": None}, "hidden_size = null"),
        (LLAMA, {"vocab_size": 1.5}, "vocab_size = 1.5"),
        (LLAMA, {"num_key_value_heads": 7}, "num_key_value_heads = 7"),
        (QWEN2, {"num_key_value_heads": None}, "num_key_value_heads = null"),
        (QWEN3, {"head_dim": None}, "head_dim = null"),
        (LLAMA, {"head_dim": 7}, "head_dim = 7"),
        (LLAMA, {"head_dim": None, "hidden_size": 4097}, "head_dim = null"),
        (LLAMA, {"rms_norm_eps": float("nan")}, "rms_norm_eps = NaN"),
        (LLAMA, {"tie_word_embeddings": "no"}, 'tie_word_embeddings = "no"'),
        (LLAMA, {"eos_token_id": "</s>"}, "eos_token_id"),
        (LLAMA, OLD | {"rope_scaling": {"rope_type": "longrope", "factor": 4.0}}, "longrope"),
        (LLAMA, OLD | {"rope_scaling": {"type": "su", "factor": 4.0}}, '"su"'),
        (LLAMA, OLD | {"rope_scaling": {"rope_type": "linear"}}, "factor = null"),
        (LLAMA, OLD | {"rope_scaling": "linear"}, "rope_scaling"),
        (LLAMA, NEW | {"rope_parameters": NESTED}, "between layers"),
        (LLAMA, NEW | {"rope_parameters": PARTIAL}, "partial_rotary_factor"),
        (LLAMA, {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "rope_scaling differ"),
        (LLAMA, OLD | {"rope_scaling": DYNAMIC}, "original_max_position_embeddings = 9"),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(
    raw: dict[str, Any], change: dict[str, Any], named: str
) -> None:
    config_from_json(raw, "config.json")
    with pytest.raises(UserError, match=named) as caught:
        config_from_json(raw | change, "DIR/config.json")
    assert str(caught.value).startswith("DIR/config.json: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("raw", "change"),
    [
        (QWEN2, WINDOW | {"use_sliding_window": False}),
        (QWEN2, WINDOW | {"max_window_layers": 24}),
        (QWEN3, WINDOW | {"layer_types": ["full_attention"] * 28}),
        (MISTRAL, {"sliding_window": 32_768}),
        (LLAMA, {"pretraining_tp": 4, "attention_dropout": 0.1, "hidden_act": "swish"}),
        (LLAMA, {"partial_rotary_factor": 1.0, "rope_interleaved": False}),
        (LLAMA, {"quantization_config": None, "auto_map": None, "unknown": 1}),
    ],
)
def test_what_changes_nothing_is_accepted(raw: dict[str, Any], change: dict[str, Any]) -> None:
    assert config_from_json(raw | change, "x") == config_from_json(raw, "x")


def test_yarn_with_mscale() -> None:
    """The quotient of both scalings replaces the attention factor (as in DeepSeek's files)."""
    yarn = {"rope_type": "yarn", "factor": 16.0, "mscale": 1.0, "mscale_all_dim": 0.8}
    raw = LLAMA | OLD | {"rope_scaling": yarn | {"original_max_position_embeddings": 4096}}
    rope = config_from_json(raw, "x").rope
    expected = (0.1 * np.log(16) + 1) / (0.08 * np.log(16) + 1)
    assert rope.attention_factor is not None
    assert_close(rope.attention_factor, expected, "float32", "forward")
    assert rope.original_max_positions == 4096


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """A copy of llama_tied to damage."""
    directory = tmp_path / "copied"
    shutil.copytree(GOLDEN / "llama_tied", directory)
    return directory


def damage(directory: Path, change: dict[str, np.ndarray | None]) -> None:
    """Replaces, adds or (None) removes tensors."""
    tensors: dict[str, Any] = load_file(directory / "model.safetensors") | change
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(kept, directory / "model.safetensors")


NORM = "model.layers.1.input_layernorm.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({NORM: None}, f"{NORM} is missing"),
        ({NORM: np.ones(63, np.float32)}, rf"{NORM} has shape \[63\], expected \[64\]"),
        (
            {"model.layers.0.self_attn.q_proj.bias": np.ones(64, np.float32)},
            "q_proj.bias is no parameter of this model",
        ),
        ({NORM: np.ones(64, np.int8)}, f"{NORM} has dtype I8"),
        ({"lm_head.weight": np.ones((256, 64), np.float32)}, "lm_head.weight differs from"),
    ],
)
def test_tensors_that_do_not_fit_are_named(
    change: dict[str, Any], message: str, copied: Path
) -> None:
    damage(copied, change)
    with pytest.raises(UserError, match=message):
        open_weights(copied)


def test_more_layers_than_tensors(copied: Path) -> None:
    """Refused before all their names are listed."""
    raw = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps(raw | {"num_hidden_layers": 100_000}))
    with pytest.raises(UserError, match="config has 100000 layers, for 29 tensors"):
        open_weights(copied)


def test_tensors_that_are_no_parameters_are_passed_over(copied: Path) -> None:
    embed = load_file(copied / "model.safetensors")["model.embed_tokens.weight"]
    inv_freq = np.ones(4, np.float32)
    damage(
        copied,
        {
            "lm_head.weight": embed,
            "model.layers.0.self_attn.rotary_emb.inv_freq": inv_freq,
            "model.rotary_emb.inv_freq": inv_freq,
        },
    )
    weights = open_weights(copied)
    assert "lm_head" not in weights.paths
    assert_close(weights.read("embed"), embed, "float32", "exact")


def test_a_tied_model_that_stores_only_its_head(copied: Path) -> None:
    embed = load_file(copied / "model.safetensors")["model.embed_tokens.weight"]
    damage(copied, {"model.embed_tokens.weight": None, "lm_head.weight": embed})
    assert_close(open_weights(copied).read("embed"), embed, "float32", "exact")
    damage(copied, {"lm_head.weight": embed[:-1]})
    with pytest.raises(UserError, match=r"embed_tokens\.weight has shape \[255, 64\]"):
        open_weights(copied)


@pytest.mark.parametrize("place", ["", "model.", "model.layers.1."])
@pytest.mark.parametrize("wrapper", ["_orig_mod.", "module.", "module._orig_mod."])
def test_names_that_wrappers_of_modules_add_are_removed(
    wrapper: str, place: str, copied: Path
) -> None:
    original = open_weights(copied)
    stored = load_file(copied / "model.safetensors")
    renamed = {
        name.replace(place, place + wrapper, 1) if name.startswith(place) else name: tensor
        for name, tensor in stored.items()
    }
    renamed |= {f"{wrapper}model.rotary_emb.inv_freq": np.ones(4, np.float32)}
    damage(copied, dict.fromkeys(stored, None) | renamed)
    for path in original.paths:
        assert_close(open_weights(copied).read(path), original.read(path), "float32", "exact")
    damage(copied, {NORM: stored[NORM], f"{wrapper}{NORM}": stored[NORM]})
    with pytest.raises(UserError, match="is also stored as"):
        open_weights(copied)


@pytest.mark.parametrize("content", [b"", b"version https://git-lfs.github.com/spec/v1", None])
def test_broken_safetensors(content: bytes | None, copied: Path) -> None:
    file = copied / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] if content is None else content)
    with pytest.raises(UserError, match=r"model\.safetensors: cannot be read as") as caught:
        open_weights(copied)
    assert ("Git LFS pointer" in str(caught.value)) == bool(content)


@pytest.mark.parametrize("content", ["{", "[]", "{}"])
def test_broken_config(content: str, copied: Path) -> None:
    (copied / "config.json").write_text(content)
    with pytest.raises(UserError, match=r"config\.json: "):
        open_weights(copied)


def test_broken_directories(copied: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no such path; expected a local .* nothing is downloaded"):
        open_weights(tmp_path / "nothing")
    with pytest.raises(UserError, match=r"no config\.json"):
        open_weights(tmp_path)
    with pytest.raises(UserError, match=r"neither a directory nor a \.gguf file"):
        open_weights(copied / "config.json")
    (copied / "model.safetensors").rename(copied / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"needs model\.safetensors .* found pytorch_model\.bin"):
        open_weights(copied)


def test_broken_indices(tmp_path: Path) -> None:
    directory = tmp_path / "sharded"
    shutil.copytree(GOLDEN / "llama_gqa_sharded", directory)
    shard = directory / "model-00002-of-00004.safetensors"
    shard.rename(tmp_path / "away")
    with pytest.raises(UserError, match=r"model-00002-of-00004\.safetensors is listed and is not"):
        open_weights(directory)
    shutil.copyfile(directory / "model-00001-of-00004.safetensors", shard)
    with pytest.raises(UserError, match="is also in another shard"):
        open_weights(directory)
    (directory / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(UserError, match="no weight_map"):
        open_weights(directory)


def test_a_model_inside_a_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "packaged_model"
    package.mkdir()
    (package / "__init__.py").write_text("raise AssertionError('found, not imported')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match="0 GGUF files"):
        locate("package:packaged_model")
    (package / "a.gguf").touch()
    assert locate("package:packaged_model") == package / "a.gguf"
    (package / "b.gguf").touch()
    with pytest.raises(UserError, match="2 GGUF files"):
        locate("package:packaged_model")
    for name in ("package:no_such_package", "package:os.path", "package:json.nothing"):
        with pytest.raises(UserError, match="no package of that name is installed"):
            locate(name)
