"""Complete runs that train adapters with a teacher: what is frozen, what is stored, continuation,
export."""

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sat_jax
from sat_jax.compress import load_adapter, merge_factors, without_adapters
from sat_jax.config import Config
from sat_jax.config_values import from_config_dict, load
from sat_jax.interop import open_weights
from sat_jax.models.build import layout_of
from sat_jax.models.gpt2 import GPT2Config
from sat_jax.models.llama import LlamaConfig
from sat_jax.parallel.mesh import make_mesh
from sat_jax.sparsity.flops import forward_flops
from sat_jax.sparsity.plan import make_plan
from sat_jax.train.checkpoint import find
from sat_jax.train.loop import train
from sat_jax.train.metrics import read_metrics
from sat_jax.train.programs import Programs
from sat_jax.train.run_weights import open_run
from sat_jax.train.setup import controller_of, set_up
from sat_jax.train.step_program import count_bytes
from tests.conftest import ROOT, RunPython
from tests.small_models import neurons, random_params
from tests.test_config import nested
from tests.tolerances import assert_close
from tests.user_errors import user_error

# Half omitted for 4 steps, then nothing; the checkpoint at 3 is between two refreshes.
SETTINGS: dict[str, Any] = {
    "data.sources": "README.md,LICENSE",
    "data.row_length": 32,
    "train.steps": 6,
    "train.rows_per_step": 4,
    "train.eval_every": 0,
    "train.measure_speed": False,
    "sparsity.rungs": 1,
    "sparsity.split": 0.7,
    "sparsity.probe_tokens": 64,
    "sparsity.balance": 2,
    "checkpoint.every": 3,
    "optimizer.weight_decay": 0.1,
    "lora.rank": 2,
    "lora.trained": "norms",
    "distill.weight": 0.3,
    "distill.divergence": "js",
}
# Of another family, with the byte tokens of the trained model.
TEACHER = GPT2Config(
    vocab_size=260, d_model=16, n_layers=4, n_heads=2, d_ff=24, max_positions=32
)  # fmt: skip


def settings(**changes: Any) -> Config:
    values = SETTINGS | {key.replace("__", "."): value for key, value in changes.items()}
    overrides = [f"{key}={value}" for key, value in values.items()]
    return load(str(ROOT / "experiments/tiny.py"), overrides)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "teacher"
    sat_jax.save_model(layout_of(TEACHER).bind(random_params(TEACHER)), path)
    return path


@pytest.fixture(scope="module")
def finished(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "lora"
    train(settings(distill__teacher=teacher), path, lambda _: None)
    return path


def arrays(path: Path, step: int | None = None) -> dict[str, np.ndarray]:
    stored = find(path / "checkpoints", step)
    read: dict[str, np.ndarray] = stored.read(stored.leaves)
    return read


@pytest.mark.slow
def test_a_run_trains_adapters_alone(finished: Path) -> None:
    steps = [r for r in read_metrics(finished / "metrics.jsonl") if "loss" in r]
    assert [r["omission_rate"] for r in steps] == [0.5] * 4 + [0.0] * 2
    before, after = [
        r["eval_loss"] for r in read_metrics(finished / "metrics.jsonl") if "eval_loss" in r
    ]
    assert after < before
    early, late = arrays(finished, 3), arrays(finished)
    moments = {n.split("/", 3)[3] for n in late if n.startswith("optimizer/0/mu/")}
    changed = set()
    for name, value in late.items():
        if name.startswith("params/") and not np.array_equal(value, early[name]):
            changed.add(name.removeprefix("params/"))
    assert changed == moments
    assert all("/update/" in name or "norm" in name for name in moments)
    assert {
        f"layers/{n}/update/{f}" for n in ("mlp/up", "attention/query") for f in ("left", "right")
    } <= moments
    assert {"final_norm", "layers/mlp_norm", "layers/attention_norm"} <= moments


@pytest.mark.slow
def test_losses_and_costs_have_their_parts(finished: Path) -> None:
    steps = [r for r in read_metrics(finished / "metrics.jsonl") if "loss" in r]
    sums = [0.7 * r["cross_entropy"] + 0.3 * r["divergence"] for r in steps]
    assert_close([r["loss"] for r in steps], sums, "float32", "forward")
    assert all(0 < r["divergence"] < math.log(2) for r in steps)
    summary = json.loads((finished / "summary.json").read_text())
    forward = forward_flops(layout_of(TEACHER), 32).total
    assert summary["teacher_flops"] == summary["tokens"] * forward
    assert summary["teacher_flops"] < summary["spent_flops"] < summary["dense_flops"]


@pytest.mark.slow
def test_a_run_continues_bit_by_bit(finished: Path, teacher: Path, tmp_path: Path) -> None:
    """With the teacher at another path, but not with another teacher."""
    moved, other = tmp_path / "moved", tmp_path / "other"
    shutil.copytree(teacher, moved)
    sat_jax.save_model(layout_of(TEACHER).bind(random_params(TEACHER, 1)), other)
    path = tmp_path / "continued"
    shutil.copytree(finished, path)
    (path / "summary.json").unlink()
    shutil.rmtree(path / "checkpoints" / "6")
    lines: list[str] = []
    refused = user_error(lambda: train(settings(distill__teacher=other), path, lines.append))
    assert "the content of distill.teacher is not that of the start of the run" in refused
    train(settings(distill__teacher=moved), path, lines.append)
    assert "continuing after step 3" in lines
    expected = arrays(finished)
    for name, value in arrays(path).items():
        np.testing.assert_array_equal(value, expected[name], err_msg=name, strict=True)


@pytest.mark.slow
def test_a_run_can_be_a_teacher(finished: Path) -> None:
    """With its adapters merged; its tokenizer is compared with that of the new run."""
    lines: list[str] = []
    teacher = set_up(settings(distill__teacher=finished), lines.append).teacher
    assert teacher is not None and not any("no tokenizer" in line for line in lines)
    weights, _ = open_run(finished)
    for path, value in teacher.params.items():
        np.testing.assert_array_equal(value, weights.read(path), err_msg=path)


@pytest.mark.slow
def test_a_mesh_trains_the_same(
    finished: Path, teacher: Path, tmp_path: Path, run_python: RunPython
) -> None:
    """Stages, rows, units and the embedding axis are split."""
    mesh = {f"mesh.{axis}": 2 for axis in ("pipeline", "fsdp", "tensor")}
    changes = mesh | {"mesh.data": 1, "train.accumulate": 2, "checkpoint.every": 0}
    changes["distill.teacher"] = teacher
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


@pytest.mark.slow
def test_the_exported_model_is_merged_and_the_adapter_is_beside_it(
    finished: Path,
) -> None:
    model, tokens = sat_jax.load_model(finished), jnp.arange(16)[None]
    logits = model(tokens)
    merged = sat_jax.load_model(finished / "huggingface")
    assert_close(merged(tokens), logits, "float32", "forward")
    weights, _ = open_run(finished)
    exported = open_weights(finished / "huggingface")
    for path in weights.paths:
        np.testing.assert_array_equal(weights.read(path), exported.read(path), err_msg=path)
    summary = json.loads((finished / "summary.json").read_text())
    assert summary["adapter"] == str(finished / "adapter")
    # The file has the norms, too, which were trained in full.
    adapted = load_adapter(without_adapters(model), finished / "adapter")
    assert_close(merge_factors(adapted)(tokens), logits, "float32", "forward")
    refused = user_error(
        lambda: sat_jax.load_model(finished / "huggingface", adapter=finished / "adapter")
    )
    assert "the adapter is of another base model, with other weights" in refused


MODEL = LlamaConfig(
    vocab_size=40, d_model=16, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=4, d_ff=24,
    max_positions=64,
)  # fmt: skip


def programs(**changes: Any) -> Programs:
    values = {"data.row_length": 6, "train.rows_per_step": 1, "train.steps": 2} | changes
    config = from_config_dict(nested(values))
    return Programs(config, MODEL, make_mesh(config.mesh), controller_of(config, MODEL))


def test_the_state_has_no_moments_of_frozen_parameters() -> None:
    """By hand: float32 parameters, and two moments and update counts of the adapters."""
    used = programs(**{"lora.rank": 2})
    state = used.form(()).state
    used.close()
    units = 2 * 2 * (4 * 4 + 2 * 4) + 2 * 3 * 24  # rows of all matrices, in two layers
    matrices, others = units * 16, 2 * 40 * 16 + 5 * 16
    left, right = units * 2, 2 * 7 * 2 * 16
    # A count for each layer and head or channel of `left`, and for each layer of `right`.
    counts = 2 * 2 * (2 * 2 + 2) + 2 * 3 * 24 + 2 * 7
    scalars = count_bytes(state) - 4 * (matrices + others + 3 * (left + right) + counts)
    assert scalars == sum(leaf.size * 4 for leaf in jax.tree.leaves(state) if leaf.ndim == 0)


def test_no_gradient_of_the_base_is_compiled() -> None:
    """Gradients of matrices of MLPs, of attention and of the head are products of these shapes."""

    def products(**changes: Any) -> set[str]:
        used = programs(**changes)
        text = used.lower_step(make_plan(neurons(MODEL), 0.0, 0.0)).compile().as_text()
        used.close()
        return set(re.findall(r"= (f32\[[\d,]*\])\S* dot\(", text))

    shapes = {"f32[24,16]", "f32[16,16]", "f32[16,8]", "f32[16,40]"}
    assert products() >= shapes
    assert not products(**{"lora.rank": 2}) & shapes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora.rank": 0, "lora.alpha": 8.0}, "lora.alpha 8.0 needs lora.rank 1 or more, not 0"),
        (
            {"sparsity.rate": 0.5, "sparsity.execution": "kernel", "sparsity.block": 64},
            "lora.rank 2 excludes sparsity.execution 'kernel'; accepted: 'gather' or 'mask'",
        ),
        (
            {"sparsity.rate": 0.5, "sparsity.passes": "backward"},
            "lora.rank 2 excludes sparsity.passes 'backward'; accepted: 'all'",
        ),
        (
            {"sparsity.rate": 0.5, "sparsity.least_squares_correction": True},
            "lora.rank 2 excludes sparsity.least_squares_correction True; accepted: False",
        ),
        (
            {"sparsity.rate": 0.5, "lora.dora": True},
            "lora.dora excludes omission rates above 0 (0.5): norms of outputs need all units;"
            " accepted: one of the two",
        ),
        (
            {"sparsity.weights.density": 0.5},
            "lora.rank 2 excludes sparsity.weights.density 0.5: adapters have dense bases;"
            " accepted: one of the two",
        ),
        (
            {"lora.trained": ("biases",)},
            "lora.trained is ('biases',); accepted: one of norms, embeddings",
        ),
    ],
)
def test_settings_that_are_refused(changes: dict[str, Any], message: str) -> None:
    assert user_error(lambda: from_config_dict(nested({"lora.rank": 2} | changes))) == message
