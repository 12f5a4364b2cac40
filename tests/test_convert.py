"""scripts/convert.py: every kind of source, and errors for misuse."""

import dataclasses
import io
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from sat_jax.config import Config
from sat_jax.config_values import from_config_dict, to_dict
from sat_jax.data.conversations import chat_template, training_tokenizer
from sat_jax.data.data_format import DataFormat
from sat_jax.data.tokenizer import load_tokenizer
from sat_jax.errors import UserError
from sat_jax.interop import open_weights
from sat_jax.models.build import initial_values, shapes
from sat_jax.models.presets import preset
from sat_jax.train.checkpoint import Checkpoints
from sat_jax.train.files import write_json
from sat_jax.train.inputs import write_model
from sat_jax.train.run_weights import generation_settings
from sat_jax.train.setup import set_up
from sat_jax.train.workdir import WorkDir
from scripts.convert import main
from tests.test_gguf import METADATA, golden_tensors, write
from tests.tolerances import assert_close

GOLDEN = Path(__file__).parent / "golden"

Convert = Callable[..., str]


@pytest.fixture
def convert(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Convert:
    """Return a function that runs the script with arguments and returns its output."""

    def run(*arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", ["convert", *map(str, arguments)])
        main()
        return capsys.readouterr().out

    return run


@pytest.fixture
def finished_run(tmp_path: Path) -> Path:
    """A work directory with checkpoints of the tiny model after steps 1 and 2."""
    directory = tmp_path / "run"
    directory.mkdir()
    config = from_config_dict({"model": {"preset": "tiny"}, "data": {"tokenizer": "bytes"}})
    (directory / "config.json").write_text(json.dumps(to_dict(config)))
    tokenizer = load_tokenizer("bytes", None, preset("tiny").vocab_size)
    write_model(WorkDir(directory), preset("tiny"), tokenizer)
    with Checkpoints(directory / "checkpoints", keep_last=2) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, {"params": initial_values(preset("tiny"), step)}, {})
    return directory


def test_a_gguf_file(convert: Convert, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stderr = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stderr)
    file = write(tmp_path / "model.gguf", golden_tensors("llama_gqa"), METADATA)
    printed = convert(file, "--out", tmp_path / "out")
    assert printed.endswith("165,312 parameters in float32, without a tokenizer\n")
    assert stderr.getvalue().startswith(f"note: {file}: contains no tokenizer")
    original, written = open_weights(GOLDEN / "llama_gqa"), open_weights(tmp_path / "out")
    assert written.config == original.config
    for path in original.paths:
        assert_close(written.read(path), original.read(path), "float32", "exact")


def test_a_hugging_face_directory_in_another_dtype(convert: Convert, tmp_path: Path) -> None:
    convert(GOLDEN / "qwen3", "--out", tmp_path / "out", "--dtype", "bfloat16")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    written, original = open_weights(tmp_path / "out"), open_weights(GOLDEN / "qwen3")
    assert_close(written.read("lm_head"), original.read("lm_head"), "bfloat16", "forward")


@pytest.mark.parametrize(("arguments", "step"), [((), 2), (("--step", 1), 1)])
def test_a_run(
    arguments: tuple[object, ...], step: int, finished_run: Path, convert: Convert, tmp_path: Path
) -> None:
    printed = convert(finished_run, "--out", tmp_path / "out", *arguments)
    assert printed.endswith("with its tokenizer\n")
    written, expected = open_weights(tmp_path / "out"), initial_values(preset("tiny"), step)
    assert written.config == preset("tiny")
    for path, value in expected.items():
        assert_close(written.read(path), value, "float32", "exact")
    assert load_tokenizer("model", tmp_path / "out").encode_batch(["né"]) == [[110, 195, 169]]


def test_a_run_trained_on_conversations(
    finished_run: Path, convert: Convert, tmp_path: Path
) -> None:
    file = finished_run / "config.json"
    content = json.loads(file.read_text())
    content["data"] |= {"format": "alpaca", "chat_template": "zephyr"}
    file.write_text(json.dumps(content))
    data_format = DataFormat.from_settings(from_config_dict(content).data)
    trained = training_tokenizer(load_tokenizer("bytes", None, 257), data_format)
    write_model(WorkDir(finished_run), preset("tiny"), trained)
    convert(finished_run, "--out", tmp_path / "out")
    written = open_weights(tmp_path / "out").config
    assert written.eos_token_ids == (*preset("tiny").eos_token_ids, 256)
    tokenizer = load_tokenizer("model", tmp_path / "out")
    assert tokenizer.chat_template == chat_template("zephyr", tokenizer)


VOCABULARIES = ("tokenizer.model", "added_tokens.json", "vocab.json", "merges.txt")


@pytest.mark.parametrize("fast", [True, False])
def test_files_beside_the_weights_are_kept(fast: bool, convert: Convert, tmp_path: Path) -> None:
    source = tmp_path / "source"
    ignored = shutil.ignore_patterns("*.npz", "rope*", "grads*", "*legacy*")
    shutil.copytree(GOLDEN / "llama_gqa", source, ignore=ignored)
    if fast:
        load_tokenizer("bytes", None, 256).save(source)
    for name in ("special_tokens_map.json", *VOCABULARIES):
        (source / name).write_text("{}")
    settings = {"eos_token_id": [2, 3], "temperature": 0.6}
    (source / "generation_config.json").write_text(json.dumps(settings))
    printed = convert(source, "--out", tmp_path / "out")
    assert printed.endswith("with its tokenizer\n")
    names = {path.name for path in source.iterdir()}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names
    written = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert written == settings | {"bos_token_id": 1}


def test_settings_for_generation_of_a_run(
    finished_run: Path, convert: Convert, tmp_path: Path
) -> None:
    write_json(WorkDir(finished_run).generation, {"eos_token_id": 1, "temperature": 0.6})
    convert(finished_run, "--out", tmp_path / "out")
    written = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert written["temperature"] == 0.6
    weights = open_weights(tmp_path / "out")
    for tokenizer, kept in (("model", 0.6), ("bytes", None)):
        data = dataclasses.replace(Config().data, tokenizer=tokenizer)
        config = dataclasses.replace(Config(), data=data)
        assert generation_settings(config, weights).get("temperature") == kept
    assert generation_settings(Config(), None) == {}


def test_a_damaged_tokenizer_is_an_error(convert: Convert, tmp_path: Path) -> None:
    shutil.copytree(GOLDEN / "qwen3", tmp_path / "model")
    (tmp_path / "model" / "tokenizer.json").write_text('{"version": ')
    with pytest.raises(UserError, match=r"tokenizer\.json: not a tokenizer\.json"):
        convert(tmp_path / "model", "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_rope_that_transformers_does_not_have(convert: Convert, tmp_path: Path) -> None:
    """It is refused, also before a run that would export it, unless longrope may replace it."""
    shutil.copytree(GOLDEN / "llama_gqa", tmp_path / "model")
    raw = json.loads((GOLDEN / "llama_gqa" / "config_legacy.json").read_text())
    raw |= {"rope_scaling": {"rope_type": "ntk", "factor": 2.0}}
    write_json(tmp_path / "model" / "config.json", raw)
    with pytest.raises(UserError, match=r"no rope type 'ntk' \(its frequencies can be .*longrope"):
        convert(tmp_path / "model", "--out", tmp_path / "out")
    settings = {"model": {"path": str(tmp_path / "model")}, "export": {"huggingface": True}}
    with pytest.raises(UserError, match="transformers has no rope type 'ntk'"):
        set_up(from_config_dict(settings | {"data": {"row_length": 64}}), print)
    convert(tmp_path / "model", "--out", tmp_path / "out", "--longrope")
    config = open_weights(tmp_path / "out").config
    assert config.rope is not None and config.rope.type == "longrope"


def test_gguf_files_out(finished_run: Path, convert: Convert, tmp_path: Path) -> None:
    """Of a directory without a tokenizer, a run, and a quantized file."""
    printed = convert(GOLDEN / "gpt2", "--gguf", "Q4_0", "--out", tmp_path / "q4.gguf")
    size = (tmp_path / "q4.gguf").stat().st_size
    summary = f"27 F32 and 12 Q4_0 and 1 Q8_0 tensors, {size:,} bytes, without a tokenizer\n"
    assert printed.endswith(f" parameters in {summary}")
    assert open_weights(tmp_path / "q4.gguf").config == open_weights(GOLDEN / "gpt2").config
    printed = convert(finished_run, "--gguf", "F16", "--out", tmp_path / "run.gguf")
    assert printed.endswith("with its tokenizer\n")
    assert load_tokenizer("model", tmp_path / "run.gguf").encode_batch(["né"]) == [[110, 195, 169]]
    written, trained = open_weights(tmp_path / "run.gguf"), initial_values(preset("tiny"), 2)
    half = np.asarray(trained["embed"], np.float16).astype(np.float32)
    assert_close(written.read("embed"), half, "float32", "exact")
    with pytest.raises(UserError, match=r"quantized already \(Q4_0, Q8_0\) cannot be quantized to"):
        convert(tmp_path / "q4.gguf", "--gguf", "Q8_0", "--out", tmp_path / "q8.gguf")
    with pytest.raises(UserError, match="--dtype has no effect with --gguf"):
        convert(GOLDEN / "gpt2", "--gguf", "F16", "--dtype", "float16", "--out", tmp_path / "a")
    with pytest.raises(UserError, match="exists already; accepted: a new file"):
        convert(GOLDEN / "gpt2", "--gguf", "F16", "--out", tmp_path / "q4.gguf")


def test_misuse_is_a_user_error(finished_run: Path, convert: Convert, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--step needs the work directory of a run"):
        convert(GOLDEN / "qwen3", "--out", tmp_path / "out", "--step", 1)
    with pytest.raises(UserError, match="has no step 7"):
        convert(finished_run, "--out", tmp_path / "out", "--step", 7)
    with pytest.raises(UserError, match="exists and is not an empty directory"):
        convert(finished_run, "--out", tmp_path)
    with pytest.raises(UserError, match="--help lists what is accepted"):
        convert(finished_run)


def test_a_checkpoint_of_another_model(
    finished_run: Path, convert: Convert, tmp_path: Path
) -> None:
    path = finished_run / "checkpoints"
    with Checkpoints(path, keep_last=1) as checkpoints:
        zeros = {
            name: np.zeros(leaf.shape, leaf.dtype) for name, leaf in shapes(preset("tiny")).items()
        }
        checkpoints.save(3, {"params": zeros | {"final_norm": np.zeros(63, np.float32)}}, {})
    with pytest.raises(UserError, match=r"not of the model .* final_norm is \[63\], not \[64\]"):
        convert(finished_run, "--out", tmp_path / "out")
