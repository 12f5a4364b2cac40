"""Hugging Face directories: round trips, and errors that name what does not fit."""

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from sat_jax.data.tokenizer import load_tokenizer
from sat_jax.errors import UserError
from sat_jax.interop import load_model, locate, open_weights, save_model
from sat_jax.interop.huggingface import Dtype, write_directory
from sat_jax.interop.huggingface_config import config_to_json
from sat_jax.models.llama import LlamaConfig
from sat_jax.nn.rope import RopeConfig
from tests.test_huggingface_config import SMALL
from tests.tolerances import assert_close

GOLDEN = Path(__file__).parent / "golden"
ALL = ("llama_mha", "llama_gqa", "llama_tied", "qwen2", "qwen3", "mistral")


def export(source: str, directory: Path, **settings: Any) -> dict[str, np.ndarray]:
    """Write a golden model and return the tensors of all files."""
    weights = open_weights(GOLDEN / source)
    write_directory(directory, weights.config, weights.read, **settings)
    tensors: dict[str, np.ndarray] = {}
    for file in sorted(directory.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


@pytest.mark.parametrize("name", ALL)
def test_round_trip_in_names_shapes_and_bytes(name: str, tmp_path: Path) -> None:
    written = export(name, tmp_path / "out")
    original = load_file(GOLDEN / name / "model.safetensors")
    assert set(written) == set(original)
    for tensor in original:
        assert_close(written[tensor], original[tensor], "float32", "exact")
    assert open_weights(tmp_path / "out").config == open_weights(GOLDEN / name).config


def test_round_trip_of_a_model_keeps_its_logits(tmp_path: Path) -> None:
    model = load_model(GOLDEN / "qwen3")
    save_model(model, tmp_path / "out")
    ids = jnp.arange(1, 12)[None]
    assert_close(load_model(tmp_path / "out")(ids), model(ids), "float32", "exact")


def test_shards(tmp_path: Path) -> None:
    limit = 100_000
    written = export("llama_gqa", tmp_path / "out", shard_bytes=limit)
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert files[0].name == f"model-00001-of-{len(files):05}.safetensors"
    assert len(files) > 2
    sizes = [sum(t.nbytes for t in load_file(file).values()) for file in files]
    assert max(sizes) <= limit
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(sizes)
    assert index["weight_map"] == {name: f.name for f in files for name in load_file(f)}
    original = load_file(GOLDEN / "llama_gqa" / "model.safetensors")
    reread = open_weights(tmp_path / "out")
    assert set(written) == set(original)
    for path in reread.paths:
        expected = open_weights(GOLDEN / "llama_gqa").read(path)
        assert_close(reread.read(path), expected, "float32", "exact")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_other_dtypes(dtype: Dtype, tmp_path: Path) -> None:
    written = export("qwen2", tmp_path / "out", dtype=dtype)
    number = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    original = load_file(GOLDEN / "qwen2" / "model.safetensors")
    for name, tensor in written.items():
        assert_close(tensor, original[name].astype(number), dtype, "exact")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["torch_dtype"] == dtype
    read = open_weights(tmp_path / "out").read("embed")
    rounded = original["model.embed_tokens.weight"].astype(number).astype(np.float32)
    assert_close(read, rounded, "float32", "exact")


def test_a_parameter_is_asked_for_once_and_one_at_a_time(tmp_path: Path) -> None:
    weights = open_weights(GOLDEN / "llama_gqa")
    asked: Counter[str] = Counter()

    def read(path: str) -> np.ndarray:
        asked[path] += 1
        return weights.read(path)

    write_directory(tmp_path / "out", weights.config, read, shard_bytes=100_000)
    assert asked == dict.fromkeys(weights.paths, 1)


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


def test_writing_needs_a_new_or_empty_directory(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    export("mistral", tmp_path / "empty")
    with pytest.raises(UserError, match="exists and is not an empty directory"):
        export("mistral", tmp_path / "empty")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="exists and is not an empty directory"):
        export("mistral", tmp_path / "file")
    with pytest.raises(UserError, match="file/out: cannot be written"):
        export("mistral", tmp_path / "file" / "out")
    export("mistral", tmp_path / "new" / "folders")


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    weights = open_weights(GOLDEN / "mistral")

    def read(path: str) -> np.ndarray:
        if path.startswith("layers/mlp"):
            raise UserError("the disk is on fire")
        return weights.read(path)

    with pytest.raises(UserError, match="on fire"):
        write_directory(tmp_path / "out", weights.config, read)
    assert not list(tmp_path.iterdir())


def test_a_model_that_no_architecture_has_is_not_written(tmp_path: Path) -> None:
    config = LlamaConfig(**SMALL, qk_norm=True, qkv_bias=True, family="qwen3")
    with pytest.raises(UserError, match="no Qwen3ForCausalLM has qkv_bias=True and qk_norm=True"):
        write_directory(tmp_path / "out", config, open_weights(GOLDEN / "qwen3").read)
    with pytest.raises(UserError, match="dynamic RoPE with original_max_positions 32"):
        config_to_json(LlamaConfig(**SMALL, rope=RopeConfig(1e4, "dynamic", 2.0, 32)), "float32")


def test_tokenizer_and_generation_files(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name in ("tokenizer.json", "merges.txt", "chat_template.jinja", "notes.txt"):
        (source / name).write_text(name)
    export("llama_gqa", tmp_path / "out", tokenizer_files_from=source)
    assert {file.name for file in (tmp_path / "out").iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "merges.txt",
        "chat_template.jinja",
    }
    assert (tmp_path / "out" / "merges.txt").read_text() == "merges.txt"
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert (generation["bos_token_id"], generation["eos_token_id"]) == (1, 2)
    modes = {file.stat().st_mode & 0o777 for file in (tmp_path / "out").iterdir()}
    assert modes == {(source / "notes.txt").stat().st_mode & 0o777}


def test_a_saved_model_is_usable_with_its_tokenizer(tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    load_tokenizer("bytes").save(source)
    model = load_model(GOLDEN / "llama_gqa")
    save_model(model, out, tokenizer_files_from=source)
    assert load_tokenizer("model", out).encode_batch(["né"]) == [[110, 195, 169]]
    for nothing in (GOLDEN / "llama_gqa", source / "tokenizer.json", tmp_path / "missing.gguf"):
        with pytest.raises(UserError, match=r"no directory with tokenizer files.*scripts\.convert"):
            save_model(model, tmp_path / "refused", tokenizer_files_from=nothing)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]


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
