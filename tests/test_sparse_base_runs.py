"""Complete runs of SparseLoRA: what is trained, continuation, a mesh, and the files."""

import json
import shutil
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import sat_jax
from sat_jax.config import Config
from sat_jax.config_values import load
from sat_jax.models.retnet import RetNetConfig
from sat_jax.train.checkpoint import find
from sat_jax.train.loop import train
from sat_jax.train.metrics import read_metrics
from sat_jax.train.setup import set_up
from tests.conftest import ROOT, RunPython
from tests.tolerances import assert_close
from tests.user_errors import user_error

# Dense for 2 steps, then half omitted; the checkpoint at 3 is of a sparse step.
SETTINGS: dict[str, Any] = {
    "data.format": "prompt_completion",
    "data.chat_template": "plain",
    "data.held_out": 0.2,
    "data.row_length": 64,
    "train.steps": 5,
    "train.rows_per_step": 4,
    "train.measure_speed": False,
    "sparsity.schedule": "constant",
    "sparsity.dense_start": 0.4,
    "sparsity.refresh_every": 0,
    "sparsity.probe_tokens": 1024,
    "sparsity.metric": "sparselora",
    "sparsity.adapters": "dense",
    "sparsity.dense_answers": 0.5,
    "sparsity.balance": 2,
    "checkpoint.every": 3,
    "lora.rank": 2,
}


@pytest.fixture(scope="module")
def examples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "examples.jsonl"
    lines = [{"prompt": f"What is {n} and {n} more?", "completion": f"{2 * n}."} for n in range(80)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def settings(examples: Path, **changes: Any) -> Config:
    values = SETTINGS | {"data.sources": examples}
    values |= {key.replace("__", "."): value for key, value in changes.items()}
    overrides = [f"{key}={value}" for key, value in values.items()]
    return load(str(ROOT / "experiments/tiny.py"), overrides)


@pytest.fixture(scope="module")
def finished(examples: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "sparse"
    train(settings(examples), path, lambda _: None)
    return path


def arrays(path: Path, step: int | None = None) -> dict[str, np.ndarray]:
    stored = find(path / "checkpoints", step)
    read: dict[str, np.ndarray] = stored.read(stored.leaves)
    return read


def losses(path: Path) -> list[float]:
    return [r["loss"] for r in read_metrics(path / "metrics.jsonl") if "loss" in r]


@pytest.mark.slow
def test_all_adapters_are_trained_and_nothing_else(finished: Path) -> None:
    """Also those of omitted units, whose count of updates is that of all steps."""
    early, late = arrays(finished, 3), arrays(finished)
    changed = {n for n, value in late.items() if not np.array_equal(value, early[n])}
    params = {n for n in changed if n.startswith("params/")}
    assert params and all("/update/" in name for name in params)
    counts = [v for n, v in late.items() if "/update/left" in n and v.dtype == np.int32]
    assert counts and all((value == 5).all() for value in counts)
    assert any("/predictors/" in name for name in late)
    summary = json.loads((finished / "summary.json").read_text())
    assert summary["selections"] == 3 and summary["spent_flops"] < summary["dense_flops"]


@pytest.mark.slow
def test_a_run_continues_bit_by_bit(finished: Path, examples: Path, tmp_path: Path) -> None:
    path = tmp_path / "continued"
    shutil.copytree(finished, path)
    (path / "summary.json").unlink()
    shutil.rmtree(path / "checkpoints" / "5")
    train(settings(examples), path, lambda _: None)
    expected = arrays(finished)
    for name, value in arrays(path).items():
        np.testing.assert_array_equal(value, expected[name], err_msg=name, strict=True)


@pytest.mark.slow
def test_the_adapter_and_the_merged_model_are_written(finished: Path) -> None:
    model, tokens = sat_jax.load_model(finished), jnp.arange(16)[None]
    merged = sat_jax.load_model(finished / "huggingface")
    assert_close(merged(tokens), model(tokens), "float32", "forward")
    assert (finished / "adapter" / "adapter_config.json").is_file()


@pytest.mark.slow
def test_a_mesh_trains_the_same(
    finished: Path, examples: Path, tmp_path: Path, run_python: RunPython
) -> None:
    """Rows, units and the embedding axis are split."""
    mesh = {f"mesh.{axis}": 2 for axis in ("fsdp", "tensor")}
    done = run_python(
        *("-m", "scripts.train", "--config=experiments/tiny.py", f"--workdir={tmp_path / 'run'}"),
        f"--config.data.sources={examples}",
        *(f"--config.{key}={value}" for key, value in (SETTINGS | mesh).items()),
        devices=4,
    )
    assert done.returncode == 0, done.stderr
    assert_close(losses(tmp_path / "run"), losses(finished), "float32", "forward")


def test_rows_with_too_many_answers_are_refused(examples: Path) -> None:
    refused = user_error(
        lambda: set_up(settings(examples, sparsity__dense_answers=0.01), lambda _: None)
    )
    assert "sparsity.dense_answers 0.01: " in refused
    assert "of the 64 tokens of a training row bear loss; accepted: 0." in refused


def test_heads_of_retention_are_refused(examples: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = RetNetConfig(
        vocab_size=260, d_model=16, n_layers=2, n_heads=4, d_ff=24, d_value=32, max_positions=64
    )
    monkeypatch.setattr("sat_jax.train.setup.starting_point", lambda _: (model, None))
    refused = user_error(lambda: set_up(settings(examples), lambda _: None))
    assert refused == (
        "sparsity.adapters 'dense': the norm of each head of retention would amplify adapters of"
        " omitted heads; accepted: sparse, or sparsity.rate_attention 0"
    )
