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
