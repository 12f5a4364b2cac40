"""GPT-2 and GPT-NeoX in files: fused tensors, optional names, configs, published sizes."""

import dataclasses
import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from sat_jax.errors import UserError
from sat_jax.interop import open_weights
from sat_jax.interop.huggingface import write_directory
from sat_jax.interop.huggingface_config import config_from_json, config_to_json
from sat_jax.models import gpt2, presets, registry
from sat_jax.models.formats import Family
from sat_jax.models.gpt2 import GPT2Config
from sat_jax.models.gpt_neox import GPTNeoXConfig
from sat_jax.models.presets import preset
from sat_jax.nn.rope import RopeConfig
from tests.gpt_families import GOLDEN, stored
from tests.tolerances import assert_close

NAMES = ("gpt2", "gpt_neox")
PRESETS = {name: config for name, config in presets.PRESETS.items() if config.family in NAMES}


SIZES: dict[str, Any] = {"vocab_size": 256, "d_model": 64, "n_layers": 3, "d_ff": 256}
SIZES |= {"max_positions": 64, "bos_token_id": 0, "eos_token_ids": (0,)}


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("gpt2", GPT2Config(**SIZES, n_heads=8)),
        ("gpt2_unprefixed", GPT2Config(**SIZES, n_heads=8)),
        ("gpt_neox", GPTNeoXConfig(**SIZES, n_heads=4)),
    ],
)
def test_round_trip_in_names_shapes_and_bytes(name: str, config: Any, tmp_path: Path) -> None:
    weights = open_weights(GOLDEN / name)
    assert weights.config == config
    write_directory(tmp_path / "out", weights.config, weights.read)
    written = load_file(tmp_path / "out" / "model.safetensors")
    original = stored(name.removesuffix("_unprefixed"))
    assert set(written) == set(original)
    for tensor in original:
        assert_close(written[tensor], original[tensor], "float32", "exact")
    assert open_weights(tmp_path / "out").config == config


def test_heads_of_gpt2_follow_the_three_blocks() -> None:
    weights, tensors = open_weights(GOLDEN / "gpt2"), stored("gpt2")
    weight, bias, output = (
        tensors[f"transformer.h.1.attn.{name}"]
        for name in ("c_attn.weight", "c_attn.bias", "c_proj.weight")
    )
    for block, name in enumerate(("query", "key", "value")):
        ours, our_bias = (weights.read(f"layers/attention/{name}{end}")[1] for end in ("", "_bias"))
        for head in range(8):
            columns = slice(64 * block + 8 * head, 64 * block + 8 * (head + 1))
            assert_close(ours[head].reshape(8, 64), weight[:, columns].T, "float32", "exact")
            assert_close(our_bias[head].reshape(8), bias[columns], "float32", "exact")
    assert_close(
        weights.read("layers/attention/output")[1, 2, 0], output[16:24], "float32", "exact"
    )


def test_heads_of_gpt_neox_alternate() -> None:
    weights, tensors = open_weights(GOLDEN / "gpt_neox"), stored("gpt_neox")
    weight, bias, output = (
        tensors[f"gpt_neox.layers.1.attention.{name}"]
        for name in ("query_key_value.weight", "query_key_value.bias", "dense.weight")
    )
    for block, name in enumerate(("query", "key", "value")):
        ours, our_bias = (weights.read(f"layers/attention/{name}{end}")[1] for end in ("", "_bias"))
        for head in range(4):
            rows = slice((3 * head + block) * 16, (3 * head + block + 1) * 16)
            assert_close(ours[head].reshape(16, 64), weight[rows], "float32", "exact")
            assert_close(our_bias[head].reshape(16), bias[rows], "float32", "exact")
    our_output = weights.read("layers/attention/output")[1, 2, 0]
    assert_close(our_output, output[:, 32:48].T, "float32", "exact")


@pytest.mark.parametrize("name", NAMES)
def test_shards_read_each_parameter_once(name: str, tmp_path: Path) -> None:
    weights = open_weights(GOLDEN / name)
    reads: Counter[str] = Counter()

    def read(path: str) -> np.ndarray:
        reads[path] += 1
        return weights.read(path)

    write_directory(tmp_path / "out", weights.config, read, shard_bytes=70_000)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 5
    assert reads == dict.fromkeys(weights.paths, 1)
    reread = open_weights(tmp_path / "out")
    for path in weights.paths:
        assert_close(reread.read(path), weights.read(path), "float32", "exact")


@pytest.fixture
def copied(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    directory = tmp_path / "copied"
    shutil.copytree(GOLDEN / request.param, directory)
    return directory


def change_tensors(directory: Path, change: dict[str, np.ndarray]) -> None:
    file = directory / "model.safetensors"
    save_file(load_file(file) | change, file)


@pytest.mark.parametrize(
    ("copied", "buffers"),
    [
        ("gpt2", ("transformer.h.1.attn.bias", "transformer.h.0.attn.masked_bias")),
        ("gpt2_unprefixed", ("h.1.attn.bias", "h.0.attn.masked_bias")),
        (
            "gpt_neox",
            (
                "gpt_neox.layers.0.attention.bias",
                "gpt_neox.layers.1.attention.masked_bias",
                "gpt_neox.layers.2.attention.rotary_emb.inv_freq",
            ),
        ),
    ],
    indirect=["copied"],
)
def test_buffers_are_no_parameters_whatever_their_dtype(
    copied: Path, buffers: tuple[str, ...]
) -> None:
    change_tensors(copied, {name: np.ones((1, 1, 64, 64), bool) for name in buffers})
    open_weights(copied)
    change_tensors(copied, {f"{buffers[0]}s": np.ones(3, np.float32)})
    with pytest.raises(UserError, match=rf"{buffers[0]}s is no parameter of this model"):
        open_weights(copied)


@pytest.mark.parametrize("copied", ["gpt2"], indirect=True)
def test_a_tensor_under_both_names_is_refused(copied: Path) -> None:
    change_tensors(copied, {"h.1.ln_1.bias": np.ones(64, np.float32)})
    with pytest.raises(UserError, match=r"h\.1\.ln_1\.bias is also stored as .*h\.1\.ln_1\.bias"):
        open_weights(copied)


@pytest.mark.parametrize("copied", ["gpt2_unprefixed"], indirect=True)
def test_a_tied_head(copied: Path) -> None:
    embed = stored("gpt2_unprefixed")["wte.weight"]
    change_tensors(copied, {"lm_head.weight": embed})
    assert "lm_head" not in open_weights(copied).paths
    change_tensors(copied, {"lm_head.weight": embed + 1})
    with pytest.raises(UserError, match=r"lm_head\.weight differs from transformer\.wte\.weight"):
        open_weights(copied)
    raw = json.loads((copied / "config.json").read_text()) | {"tie_word_embeddings": False}
    (copied / "config.json").write_text(json.dumps(raw))
    assert_close(open_weights(copied).read("lm_head"), embed + 1, "float32", "exact")


def test_gpt_neox_without_attention_biases(tmp_path: Path) -> None:
    weights = open_weights(GOLDEN / "gpt_neox")
    config = dataclasses.replace(weights.config, attention_bias=False)  # type: ignore[call-arg]
    write_directory(tmp_path / "out", config, weights.read)
    reread = open_weights(tmp_path / "out")
    assert reread.config == config
    assert set(weights.paths) - set(reread.paths) == {
        *(f"layers/attention/{name}_bias" for name in ("query", "key", "value")),
        "layers/attention_output_bias",
    }


def test_absent_fields_are_those_of_transformers() -> None:
    config = config_from_json({"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}, "x")
    assert config == preset("gpt2")
    assert config_from_json({"model_type": "gpt_neox"}, "x") == GPTNeoXConfig(
        vocab_size=50_432,
        d_model=6144,
        n_layers=44,
        n_heads=64,
        d_ff=24_576,
        max_positions=2048,
        bos_token_id=0,
        eos_token_ids=(2,),
    )


def neox(**settings: Any) -> GPTNeoXConfig:
    return GPTNeoXConfig(**SIZES | {"n_heads": 4} | settings)


@pytest.mark.parametrize("form", ["old", "new", "both"])
@pytest.mark.parametrize(
    "config",
    [
        neox(rope=RopeConfig(5e5), rotary_fraction=0.5, parallel_residual=False),
        neox(rope=RopeConfig(1e4, "yarn", 4.0, 16), rotary_fraction=1.0, activation="gelu_new"),
    ],
)
def test_either_form_of_config_is_complete(config: GPTNeoXConfig, form: str) -> None:
    """transformers 4 reads rotary_emb_base and rotary_pct, transformers 5 rope_parameters."""
    raw = config_to_json(config, "float32")
    scaling = raw["rope_scaling"] or {"rope_type": "default"}
    base = {"rope_theta": raw["rotary_emb_base"], "partial_rotary_factor": raw["rotary_pct"]}
    new = {"rope_parameters": base | scaling, "dtype": "float32"}
    if form == "new":
        del raw["rotary_emb_base"], raw["rotary_pct"], raw["rope_scaling"], raw["torch_dtype"]
    assert config_from_json(raw if form == "old" else raw | new, "config.json") == config


GPT2, NEOX = preset("gpt2"), preset("pythia-70m")


@pytest.mark.parametrize(
    ("config", "change", "named"),
    [
        (GPT2, {"activation_function": "relu"}, 'activation_function = "relu".*gelu, gelu_new'),
        (GPT2, {"scale_attn_weights": False}, "scale_attn_weights = false"),
        (GPT2, {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        (GPT2, {"add_cross_attention": True}, "add_cross_attention = true"),
        (GPT2, {"n_head": 5}, "n_head = 5.*a divisor of n_embd = 768"),
        (GPT2, {"architectures": ["GPT2DoubleHeadsModel"]}, "architectures.*GPT2LMHeadModel"),
        (NEOX, {"hidden_act": "gelu_fancy"}, "hidden_act"),
        (NEOX, {"num_attention_heads": 5}, "num_attention_heads = 5"),
        (
            NEOX,
            {"rope_parameters": {"partial_rotary_factor": 0.5}},
            "rotary_pct = 0.25.*0.5, as in",
        ),
        (NEOX, {"head_dim": 32}, "head_dim = 32.*64"),
        (GPT2, {"head_dim": 32}, "head_dim = 32.*64"),
        (GPT2, {"hidden_size": 32}, "n_embd = 768.*32, as in another field"),
        (GPT2, {"n_ctx": 512}, "n_ctx = 512.*1024, as in another field"),
        (NEOX, {"rope_parameters": {"rope_theta": 1.0}}, "rotary_emb_base = 10000"),
        (NEOX, {"rope_theta": 500.0}, "rope_theta = 500.0.*10000"),
        (NEOX, {"partial_rotary_factor": 1.0}, "partial_rotary_factor = 1.0"),
        (NEOX, {"rotary_pct": 1.5, "rope_parameters": None}, "rotary_pct = 1.5"),
        (NEOX, {"rotary_pct": 0.01, "rope_parameters": None}, "an even part of the head size 64"),
        (NEOX, {"rotary_pct": 0.02, "rope_parameters": None}, "an even part of the head size 64"),
        (NEOX, {"use_parallel_residual": 1}, "use_parallel_residual = 1"),
        (NEOX, {"quantization_config": {}}, "quantization_config"),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(
    config: GPT2Config | GPTNeoXConfig, change: dict[str, Any], named: str
) -> None:
    raw = config_to_json(config, "float32")
    with pytest.raises(UserError, match=named) as caught:
        config_from_json(raw | change, "DIR/config.json")
    assert str(caught.value).startswith("DIR/config.json: ")
    assert "\n" not in str(caught.value)


def test_second_names_of_fields() -> None:
    raw = config_to_json(GPT2, "float32")
    raw["num_hidden_layers"] = raw.pop("n_layer")
    assert config_from_json(raw, "x") == GPT2
    assert config_from_json(raw | {"num_hidden_layers": 3, "n_layer": 3}, "x").n_layers == 3


def test_names_of_one_activation() -> None:
    raw = config_to_json(GPT2, "float32")
    for name in ("gelu_new", "gelu_pytorch_tanh", "gelu_fast"):
        assert config_from_json(raw | {"activation_function": name}, "x") == GPT2


def test_a_family_is_registered_once() -> None:
    with pytest.raises(ValueError, match="'gpt2' is registered twice"):
        registry.register(Family(gpt2.GPT2, gpt2.FORMATS))
