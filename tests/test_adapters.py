"""Adapter directories: names, shapes and formula of PEFT, round trips, and refusals."""

import json
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from sat_jax.compress import (
    LoraSettings,
    load_adapter,
    merge_factors,
    save_adapter,
    with_new_adapters,
)
from sat_jax.compress.adapters import (
    adapted_weights,
    check_expressible,
    read_adapter,
    write_adapter,
)
from sat_jax.compress.lora import adapters_of
from sat_jax.config_values import from_config_dict
from sat_jax.interop import load_model, open_weights, save_model
from sat_jax.nn.decoder import Decoder
from sat_jax.nn.layout import flat_values, make_layout
from sat_jax.train.run_weights import starting_point
from scripts import convert
from tests.conftest import slow_after
from tests.golden_model import GOLDEN
from tests.test_config import nested
from tests.tolerances import assert_close
from tests.user_errors import user_error

PREFIX = "base_model.model."
FAMILIES = ("llama_gqa", "qwen2", "gpt2", "gpt_neox", "retnet")
TOKENS = jnp.arange(1, 9)[None]


def adapted(name: str, settings: LoraSettings) -> Decoder:
    """A golden model with adapters that change its function."""
    model = with_new_adapters(load_model(GOLDEN / name), settings)
    layout, rng = make_layout(model), np.random.default_rng(0)
    values = flat_values(model)
    for path, value in values.items():
        if "/update/" in path:
            values[path] = jnp.asarray(0.1 * rng.normal(size=value.shape), jnp.float32)
        elif path.endswith("/magnitude"):
            values[path] = value * jnp.asarray(rng.uniform(0.5, 1.5, value.shape), jnp.float32)
    return layout.bind(values)


def read(directory: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    config = json.loads((directory / "adapter_config.json").read_text())
    return config, load_file(directory / "adapter_model.safetensors")


def merged_by_peft(
    base: dict[str, np.ndarray], config: dict[str, Any], tensors: dict[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """The tensors of a base model with an adapter, by PEFT's formulas in float64."""
    merged = dict(base)
    for name in [name for name in tensors if name.endswith(".lora_A.weight")]:
        module = name.removeprefix(PREFIX).removesuffix(".lora_A.weight")
        a, b = (tensors[f"{PREFIX}{module}.lora_{kind}.weight"].astype(float) for kind in "AB")
        r, alpha = config["r"], config["lora_alpha"]
        for end, value in config["rank_pattern"].items():
            r = value if module.endswith(f".{end}") else r
        for end, value in config["alpha_pattern"].items():
            alpha = value if module.endswith(f".{end}") else alpha
        assert len(a) == r and any(module.endswith(f".{t}") for t in config["target_modules"])
        weight = base[f"{module}.weight"].astype(float)
        weight = weight.T if config["fan_in_fan_out"] else weight
        weight = weight + alpha / (np.sqrt(r) if config["use_rslora"] else r) * b @ a
        if config["use_dora"]:
            magnitude = tensors[f"{PREFIX}{module}.lora_magnitude_vector"]
            weight *= (magnitude / np.linalg.norm(weight, axis=1))[:, None]
        merged[f"{module}.weight"] = weight.T if config["fan_in_fan_out"] else weight
    return merged


def assert_same_merged(actual: Decoder, desired: Decoder) -> None:
    merged, expected = (flat_values(merge_factors(model)) for model in (actual, desired))
    for path, value in expected.items():
        assert_close(merged[path], value, "float32", "forward")


def base_tensors(name: str, folder: Path) -> dict[str, np.ndarray]:
    save_model(load_model(GOLDEN / name), folder)
    (file,) = folder.glob("*.safetensors")
    return load_file(file)


def test_names_and_shapes_by_hand(tmp_path: Path) -> None:
    """The golden model has 3 layers of width 64 with 4 heads of size 16 and 2 KV groups."""
    settings = LoraSettings(rank=4, alpha=8.0, targets=("query", "down"))
    save_adapter(adapted("llama_gqa", settings), tmp_path / "out", base="models/base")
    config, tensors = read(tmp_path / "out")
    weights = open_weights(GOLDEN / "llama_gqa").config
    channels = weights.d_ff
    heads = weights.n_heads * weights.head_dim  # type: ignore[attr-defined]
    expected = {}
    for layer in range(weights.n_layers):
        start = f"base_model.model.model.layers.{layer}"
        expected[f"{start}.self_attn.q_proj.lora_A.weight"] = (4, 64)
        expected[f"{start}.self_attn.q_proj.lora_B.weight"] = (heads, 4)
        expected[f"{start}.mlp.down_proj.lora_A.weight"] = (4, channels)
        expected[f"{start}.mlp.down_proj.lora_B.weight"] = (64, 4)
    assert {name: tensor.shape for name, tensor in tensors.items()} == expected
    assert config == {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "models/base",
        "inference_mode": True,
        "r": 4,
        "lora_alpha": 8,
        "lora_dropout": 0.0,
        "use_rslora": False,
        "use_dora": False,
        "target_modules": ["self_attn.q_proj", "mlp.down_proj"],
        "rank_pattern": {},
        "alpha_pattern": {},
        "modules_to_save": None,
        "fan_in_fan_out": False,
        "bias": "none",
        "init_lora_weights": True,
    }


@pytest.mark.parametrize("family", slow_after(1, *FAMILIES))
def test_the_files_have_the_function_of_the_model(family: str, tmp_path: Path) -> None:
    dora = family in ("qwen2", "gpt_neox")
    model = adapted(family, LoraSettings(rank=2, alpha=6.0, rslora=dora, dora=dora))
    save_adapter(model, tmp_path / "adapter")
    save_model(merge_factors(model), tmp_path / "merged")
    (file,) = (tmp_path / "merged").glob("*.safetensors")
    expected = merged_by_peft(base_tensors(family, tmp_path / "base"), *read(tmp_path / "adapter"))
    actual = load_file(file)
    assert actual.keys() == expected.keys()
    for name, tensor in actual.items():
        assert_close(tensor, expected[name], "float32", "forward")
    again = load_adapter(load_model(GOLDEN / family), tmp_path / "adapter")
    assert_same_merged(again, model)
    merged = adapted_weights(open_weights(GOLDEN / family), tmp_path / "adapter")
    for path, value in flat_values(merge_factors(again)).items():
        np.testing.assert_array_equal(merged.read(path), value, err_msg=path)
    if family == "llama_gqa":
        same = jax.tree.map(np.array_equal, flat_values(again), flat_values(model))
        assert all(jax.tree.leaves(same))


def test_some_parameters_of_a_fused_module(tmp_path: Path) -> None:
    """Key rows of B are 0, and the rank is that of both adapters together."""
    model = adapted(
        "gpt2", LoraSettings(rank=2, alpha=6.0, targets=("query", "value", "attention/output"))
    )
    save_adapter(model, tmp_path / "adapter")
    config, tensors = read(tmp_path / "adapter")
    assert config["r"] == 4 and config["rank_pattern"] == {"attn.c_proj": 2}
    assert config["lora_alpha"] == 12 and config["alpha_pattern"] == {"attn.c_proj": 6}
    b = tensors[f"{PREFIX}transformer.h.0.attn.c_attn.lora_B.weight"]
    query, key, value = np.split(b, 3)
    assert not key.any() and not query[:, 2:].any() and not value[:, :2].any()
    again = load_adapter(load_model(GOLDEN / "gpt2"), tmp_path / "adapter")
    assert_same_merged(again, model)
    settings = LoraSettings(targets=("query",), dora=True)
    assert user_error(lambda: check_expressible(model.config, settings)) == (
        "lora.dora with query: the module attn.c_attn holds attention/query, attention/key,"
        " attention/value; accepted: all of them in lora.targets, or none"
    )


def test_a_directory_of_peft(tmp_path: Path) -> None:
    """Another rank in one layer, none in another, bfloat16, one A for query, key and value."""
    folder, rng = tmp_path / "peft", np.random.default_rng(1)
    folder.mkdir()
    tensors, width = {}, open_weights(GOLDEN / "gpt2").config.d_model
    for layer, rank in ((0, 2), (1, 3)):
        module = f"{PREFIX}transformer.h.{layer}.attn.c_attn"
        for kind, shape in (("A", (rank, width)), ("B", (3 * width, rank))):
            values = 0.1 * rng.normal(size=shape)
            tensors[f"{module}.lora_{kind}.weight"] = values.astype(ml_dtypes.bfloat16)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA", "r": 2, "lora_alpha": 4, "rank_pattern": {r"h\.1\.attn\.c_attn": 3},
        "alpha_pattern": {}, "target_modules": ["c_attn"], "use_rslora": False, "use_dora": False,
        "fan_in_fan_out": True, "init_lora_weights": True, "lora_dropout": 0.1,
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))
    model = load_adapter(load_model(GOLDEN / "gpt2"), folder)
    save_model(merge_factors(model), tmp_path / "merged")
    actual = load_file(tmp_path / "merged" / "model.safetensors")
    by_peft = {"rank_pattern": {"1.attn.c_attn": 3}, "target_modules": ["attn.c_attn"]}
    expected = merged_by_peft(base_tensors("gpt2", tmp_path / "base"), config | by_peft, tensors)
    for name, tensor in actual.items():
        assert_close(tensor, expected[name], "float32", "forward")
    assert {lora.update.rank for lora in adapters_of(model).values()} == {3}


def test_parameters_that_were_trained_in_full(tmp_path: Path) -> None:
    """A tied head is written too, since PEFT does not tie it to a trained embedding."""
    model = adapted("llama_tied", LoraSettings(rank=2, targets=("up",)))
    values = {path: np.asarray(value) for path, value in flat_values(model).items()}
    full = {path: values[path] + 1 for path in ("embed", "final_norm", "layers/mlp_norm")}
    loras = jax.tree.map(np.asarray, adapters_of(model))
    place = tmp_path / "adapter"
    write_adapter(
        place, model.config, loras, lambda p: full.get(p, values.get(f"{p}/base")), list(full)
    )
    config, tensors = read(place)
    assert sorted(config["modules_to_save"]) == [
        "lm_head", "model.embed_tokens", "model.norm", "post_attention_layernorm",
    ]  # fmt: skip
    names = {
        "model.embed_tokens",
        "lm_head",
        "model.norm",
        "model.layers.0.post_attention_layernorm",
    }
    assert {f"{PREFIX}{name}.weight" for name in names} <= tensors.keys()
    replaced = read_adapter(place, model.config, lambda p: values[f"{p}/base"])
    assert replaced.keys() == {*full, "layers/mlp/up"}
    for path, value in full.items():
        np.testing.assert_array_equal(replaced[path], value)
    save_file(
        tensors | {f"{PREFIX}lm_head.weight": 0 * full["embed"]},
        place / "adapter_model.safetensors",
    )
    assert (
        "lm_head.weight differs from model.embed_tokens.weight, which this model ties"
        in user_error(lambda: load_adapter(load_model(GOLDEN / "llama_tied"), place))
    )


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapters") / "saved"
    save_adapter(adapted("llama_gqa", LoraSettings(rank=2, targets=("query",))), folder)
    return folder


@pytest.mark.parametrize(
    ("base", "message"),
    [
        ("gpt2", "of another base model: model.layers.0.self_attn.q_proj is no part of this one;"),
        ("qwen2", "of another base model"),
        ("llama_mha", "of another base model"),
    ],
)
def test_an_adapter_of_another_base_is_refused(base: str, message: str, saved: Path) -> None:
    assert message in user_error(lambda: load_adapter(load_model(GOLDEN / base), saved))


def test_weights_of_the_base_are_compared(saved: Path, tmp_path: Path) -> None:
    model = load_model(GOLDEN / "llama_gqa")
    load_adapter(model, saved)
    values = flat_values(model)
    values["layers/attention/query"] = values["layers/attention/query"].at[1, 0, 0, 0, 0].add(1e-3)
    other = make_layout(model).bind(values)
    assert user_error(lambda: load_adapter(other, saved)) == (
        f"{saved}: the adapter is of another base model, with other weights in the adapted"
        " matrices; accepted: the model that it was trained on"
    )
    adapter = load_adapter(model, saved)
    assert "the model has adapters already" in user_error(lambda: load_adapter(adapter, saved))
    assert "the model has no adapters" in user_error(lambda: save_adapter(model, tmp_path / "out"))
    assert "exists and is not an empty directory" in user_error(
        lambda: save_adapter(adapter, saved)
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "IA3"}, 'peft_type = "IA3" is not supported; accepted: "LORA"'),
        ({"bias": "all"}, 'bias = "all" is not supported; accepted: "none" or null'),
        ({"init_lora_weights": "pissa"}, 'init_lora_weights = "pissa" is not supported'),
        ({"r": 3}, "lora_A of model.layers.0.self_attn.q_proj has shape [2, 64], expected [3, 64]"),
        ({"use_dora": True}, "q_proj has lora_A, lora_B; accepted: lora_A, lora_B, lora_magnitude"),
        ({"lora_alpha": -1}, "lora_alpha = -1 is not supported; accepted: a number above 0"),
    ],
)
def test_settings_that_are_refused(
    changes: dict[str, Any], message: str, saved: Path, tmp_path: Path
) -> None:
    config, tensors = read(saved)
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | changes))
    model = load_model(GOLDEN / "llama_gqa")
    assert message in user_error(lambda: load_adapter(model, tmp_path))


def test_a_directory_without_the_files_is_refused(saved: Path, tmp_path: Path) -> None:
    model = load_model(GOLDEN / "llama_gqa")
    assert user_error(lambda: load_adapter(model, tmp_path)) == (
        f"{tmp_path}: no adapter_config.json; accepted: an adapter directory of PEFT"
    )
    (tmp_path / "adapter_config.json").write_text((saved / "adapter_config.json").read_text())
    assert "adapters that PEFT saved as safetensors" in user_error(
        lambda: load_adapter(model, tmp_path)
    )


def test_a_merged_model_is_a_starting_point_and_can_be_converted(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = str(GOLDEN / "llama_gqa")
    model = flat_values(merge_factors(load_adapter(load_model(source), saved)))
    config = from_config_dict(nested({"model.path": source, "model.adapter": str(saved)}))
    _, weights = starting_point(config)
    assert weights is not None
    arguments = ["convert", source, "--adapter", str(saved), "--out", str(tmp_path / "merged")]
    monkeypatch.setattr(sys, "argv", arguments)
    convert.main()
    converted = open_weights(tmp_path / "merged")
    for path, value in model.items():
        np.testing.assert_array_equal(weights.read(path), value, err_msg=path)
        np.testing.assert_array_equal(converted.read(path), value, err_msg=path)
    assert user_error(lambda: from_config_dict(nested({"model.adapter": "a"}))) == (
        "model.adapter 'a' needs model.path, the model that it was trained on"
    )
