"""Complete runs that train adapters of a quantized base: continuation, export, meshes."""

import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sat_jax
from sat_jax.compress import merge_factors, without_adapters
from sat_jax.compress.packed import base_method, quantized_reader
from sat_jax.config import Config
from sat_jax.config_values import load
from sat_jax.interop import open_weights, quantized
from sat_jax.models.build import layout_of
from sat_jax.models.presets import preset
from sat_jax.nn.layout import parameters
from sat_jax.nn.quantized import Quantized
from sat_jax.train.loop import train
from sat_jax.train.metrics import read_metrics
from sat_jax.train.run_weights import open_run
from sat_jax.train.setup import initial_params, set_up
from tests.conftest import ROOT, RunPython
from tests.small_models import random_params
from tests.test_lora_runs import arrays
from tests.tolerances import assert_close
from tests.user_errors import user_error

SETTINGS: dict[str, Any] = {
    "data.sources": "README.md,LICENSE",
    "data.row_length": 32,
    "train.steps": 4,
    "train.rows_per_step": 4,
    "train.eval_every": 0,
    "train.measure_speed": False,
    "sparsity.rate": 0.0,
    "checkpoint.every": 2,
    "optimizer.weight_decay": 0.1,
    "lora.rank": 2,
    "lora.targets": "query,down",
}
BASE = {"lora.base": "nf4", "lora.group": 16}
TINY: Any = preset("tiny")


def settings(**changes: Any) -> Config:
    values = SETTINGS | {key.replace("__", "."): value for key, value in changes.items()}
    overrides = [f"{key}={value}" for key, value in values.items()]
    return load(str(ROOT / "experiments/tiny.py"), overrides)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "qlora"
    train(settings(**BASE), path, lambda _: None)
    return path


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of the tiny model as `scripts.compress` quantizes it, with scales of inputs."""
    path, layout = tmp_path_factory.mktemp("models") / "awq", layout_of(TINY)
    method = base_method("int4", 16)
    assert method is not None
    read = quantized_reader(random_params(TINY).__getitem__, layout, method)
    weights = {name: jax.tree.map(jnp.asarray, read(name)) for name in layout.leaves}
    packing = method.packing._replace(input_scale=True)
    for name, leaf in layout.with_role("read", "write"):
        abstract = packing.abstract(layout.shapes[name].shape, leaf.role == "write").input_scale
        scales = jnp.linspace(0.5, 2, abstract.size).reshape(abstract.shape)
        weights[name] = Quantized(
            weights[name].values, weights[name].scale, scales, weights[name].writes
        )
    quantized.write_directory(
        *(path, TINY, layout.bind(weights), packing._asdict()),
        dtype="float32",
        files={},
        generation={},
    )
    return path


@pytest.mark.slow
def test_a_run_continues_bit_by_bit_and_keeps_its_base(finished: Path, tmp_path: Path) -> None:
    path = tmp_path / "continued"
    shutil.copytree(finished, path)
    (path / "summary.json").unlink()
    shutil.rmtree(path / "checkpoints" / "4")
    early, expected = arrays(path), arrays(finished)
    train(settings(**BASE), path, lambda _: None)
    packed = [name for name in early if name.endswith(("/values", "/scale"))]
    assert len(packed) == 2 * 7
    for name, value in arrays(path).items():
        np.testing.assert_array_equal(value, expected[name], err_msg=name, strict=True)
        if name in packed:
            np.testing.assert_array_equal(value, early[name], err_msg=name, strict=True)
    assert early["params/layers/mlp/up/values"].dtype == np.uint8


@pytest.mark.slow
def test_the_merged_model_and_the_adapter(finished: Path, tmp_path: Path) -> None:
    """The adapter is one of the quantized base, which `scripts.compress` writes too, and of no
    float one."""
    model, tokens = sat_jax.load_model(finished), jnp.arange(16)[None]
    logits = model(tokens)
    merged = sat_jax.load_model(finished / "huggingface")
    assert_close(merged(tokens), logits, "float32", "forward")
    weights, exported = open_run(finished)[0], open_weights(finished / "huggingface")
    for path in weights.paths:
        np.testing.assert_array_equal(weights.read(path), exported.read(path), err_msg=path)
    base = without_adapters(model)
    assert isinstance(parameters(base)["layers/mlp/down"], Quantized)
    method = base_method("nf4", 16)
    assert method is not None
    quantized.write_directory(
        *(tmp_path / "base", TINY, base, method.file_settings),
        dtype="float32",
        files={},
        generation={},
    )
    again = sat_jax.load_model(tmp_path / "base", adapter=finished / "adapter")
    assert_close(again(tokens), logits, "float32", "forward")
    sat_jax.save_model(merge_factors(base), tmp_path / "dense")
    dense = sat_jax.load_model(tmp_path / "dense", adapter=finished / "adapter")
    assert_close(dense(tokens), logits, "float32", "forward")
    other = user_error(
        lambda: sat_jax.load_model(finished / "huggingface", adapter=finished / "adapter")
    )
    assert "the adapter is of another base model, with other weights" in other


@pytest.mark.slow
def test_adapters_of_a_quantized_directory(stored: Path, tmp_path: Path) -> None:
    """The base is what the files have, and needs no settings. The run can be read without it."""
    config = settings(model__path=stored, data__tokenizer="bytes", train__steps=2, lora__targets="")
    path = tmp_path / "run"
    train(config, path, lambda _: None)
    opened, result = open_weights(stored), arrays(path)
    for name in ("query", "output"):
        weight = opened.stored(f"layers/attention/{name}")  # type: ignore[misc]
        for part in ("values", "scale", "input_scale"):
            value = result[f"params/layers/attention/{name}/base/{part}"]
            np.testing.assert_array_equal(value, getattr(weight, part), strict=True)
    shutil.move(stored, tmp_path / "moved")
    logits = sat_jax.load_model(path)(jnp.arange(16)[None])
    shutil.move(tmp_path / "moved", stored)
    adapted = sat_jax.load_model(stored, adapter=path / "adapter")
    assert_close(adapted(jnp.arange(16)[None]), logits, "float32", "forward")


def test_the_base_of_a_preset_is_its_initial_model_quantized() -> None:
    task = set_up(settings(**BASE), lambda _: None)
    params = initial_params(task)
    plain = initial_params(set_up(settings(lora__rank=0, lora__targets=""), lambda _: None))
    method = base_method("nf4", 16)
    assert method is not None
    expected = quantized_reader(plain.__getitem__, layout_of(TINY), method)("layers/mlp/down")
    for part in ("values", "scale"):
        value = params[f"layers/mlp/down/base/{part}"]
        np.testing.assert_array_equal(value, getattr(expected, part), strict=True)
    np.testing.assert_array_equal(params["embed"], plain["embed"])


@pytest.mark.slow
def test_a_mesh_trains_the_same(finished: Path, tmp_path: Path, run_python: RunPython) -> None:
    """Stages, units and the embedding axis, of which a byte has two weights, are split."""
    mesh = {f"mesh.{axis}": 2 for axis in ("pipeline", "fsdp", "tensor")}
    changes = BASE | mesh | {"mesh.data": 1, "train.accumulate": 2, "checkpoint.every": 0}
    done = run_python(
        *("-m", "scripts.train", "--config=experiments/tiny.py", f"--workdir={tmp_path / 'run'}"),
        *(f"--config.{key}={value}" for key, value in (SETTINGS | changes).items()),
        devices=8,
    )
    assert done.returncode == 0, done.stderr
    losses = [
        [r["loss"] for r in read_metrics(path / "metrics.jsonl") if "loss" in r]
        for path in (tmp_path / "run", finished)
    ]
    assert_close(*losses, "float32", "forward")
