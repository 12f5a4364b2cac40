"""Writing of Hugging Face directories: tensors, dtypes, shards, and the files beside them."""

import json
import shutil
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from sat_jax.data.tokenizer import load_tokenizer
from sat_jax.errors import UserError
from sat_jax.interop import load_model, open_weights, save_model
from sat_jax.interop.huggingface import Dtype, write_directory
from sat_jax.interop.huggingface_config import config_to_json
from sat_jax.models.build import build
from sat_jax.nn.rope import RopeConfig
from sat_jax.tokenizer_files import read_tokenizer_files
from tests.small_models import CONFIGS
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


@pytest.mark.parametrize(
    ("dtype", "value"), [("float16", 65_520.0), ("float16", -1e5), ("bfloat16", 3.4e38)]
)
def test_values_that_the_dtype_cannot_represent_are_refused(
    dtype: Dtype, value: float, tmp_path: Path
) -> None:
    weights = open_weights(GOLDEN / "mistral")

    def read(path: str, value: float = value) -> np.ndarray:
        parameter = weights.read(path)
        if path == "final_norm":
            parameter[3] = value
        return parameter

    with pytest.raises(UserError, match=rf"tensor model\.norm\.weight has .* {dtype} cannot"):
        write_directory(tmp_path / "out", weights.config, read, dtype=dtype)
    assert not list(tmp_path.iterdir())
    for written in (65_504.0, np.inf):  # the largest value; a value that is already infinite
        write_directory(
            tmp_path / str(written), weights.config, partial(read, value=written), dtype=dtype
        )


def test_a_parameter_is_asked_for_once_and_one_at_a_time(tmp_path: Path) -> None:
    weights = open_weights(GOLDEN / "llama_gqa")
    asked: Counter[str] = Counter()

    def read(path: str) -> np.ndarray:
        asked[path] += 1
        return weights.read(path)

    write_directory(tmp_path / "out", weights.config, read, shard_bytes=100_000)
    assert asked == dict.fromkeys(weights.paths, 1)


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
    config = replace(CONFIGS["norm"], qkv_bias=True)
    with pytest.raises(UserError, match="no Qwen3ForCausalLM has qkv_bias=True and qk_norm=True"):
        write_directory(tmp_path / "out", config, open_weights(GOLDEN / "qwen3").read)
    with pytest.raises(UserError, match="dynamic RoPE with original_max_positions 16"):
        config_to_json(replace(CONFIGS["gqa"], rope=RopeConfig(1e4, "dynamic", 2.0, 16)), "float32")


def test_rope_that_transformers_does_not_have(tmp_path: Path) -> None:
    """It is refused by name, or written as longrope with the same logits."""
    weights = open_weights(GOLDEN / "llama_gqa")
    for rope, offer in (
        (RopeConfig(1e4, "dynamic_yarn", 1.0, 32), "; accepted: default, linear, yarn, dynamic"),
        (RopeConfig(1e4, "yarn_paper", 4.0, 32), " .its frequencies can be written as longrope"),
    ):
        config = replace(weights.config, rope=rope)  # type: ignore[call-arg]
        with pytest.raises(UserError, match=f"no rope type '{rope.type}'{offer}"):
            write_directory(tmp_path / "out", config, weights.read)
    write_directory(tmp_path / "out", config, weights.read, longrope=True)
    written = load_model(tmp_path / "out")
    assert written.config.rope.type == "longrope"
    tokens = jnp.arange(60)[None]
    expected = build(config, weights.read)(tokens)
    assert_close(written(tokens), expected, "float32", "forward")


def test_tokenizer_and_generation_files(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name in ("tokenizer.json", "merges.txt", "chat_template.jinja", "notes.txt"):
        (source / name).write_text(name)
    export("llama_gqa", tmp_path / "out", files=read_tokenizer_files(source))
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


SAMPLING = {"eos_token_id": [2, 7], "pad_token_id": 5, "temperature": 0.6, "do_sample": True}


def test_settings_for_generation_are_kept(tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(GOLDEN / "llama_gqa", source)
    (source / "generation_config.json").write_text(json.dumps(SAMPLING))
    (source / "vocab.json").write_text("{}")
    weights = open_weights(source)
    assert weights.config.eos_token_ids == (2, 7)  # where generation stops
    write_directory(tmp_path / "a", weights.config, weights.read, generation=weights.generation)
    save_model(load_model(source), tmp_path / "b", tokenizer_files_from=source)
    for directory in ("a", "b"):
        written = json.loads((tmp_path / directory / "generation_config.json").read_text())
        assert written == {"bos_token_id": 1, **SAMPLING}
        assert open_weights(tmp_path / directory).config == weights.config
    # Without end tokens in this file, they are those of config.json.
    (source / "generation_config.json").write_text('{"eos_token_id": null, "top_p": 0.9}')
    assert open_weights(source).config.eos_token_ids == (2,)
    (source / "generation_config.json").write_text('{"eos_token_id": "</s>"}')
    with pytest.raises(UserError, match=r"generation_config\.json: eos_token_id = "):
        open_weights(source)
