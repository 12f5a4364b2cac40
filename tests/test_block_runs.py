"""Complete runs with block-sparse matrices: growth, exchange, switch to dense, continuation."""

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sat_jax
from sat_jax.config import Config
from sat_jax.config_values import load
from sat_jax.data.batches import in_order, open_split
from sat_jax.train.checkpoint import find
from sat_jax.train.loop import train
from sat_jax.train.metrics import read_metrics
from sat_jax.train.setup import set_up
from tests.conftest import ROOT, RunPython
from tests.tolerances import assert_close

pytestmark = pytest.mark.slow  # a run takes seconds, most of them to compile

STEPS = 12
# A quarter of the blocks for 6 steps, 62.5 % for 3, all for 3. Blocks are exchanged before steps
# 3, 5 and 9, so that the checkpoint at 5 is between an exchange and the growth.
BASE: dict[str, Any] = {
    "data.sources": "README.md,CHANGELOG.md",
    "data.row_length": 32,
    "train.steps": STEPS,
    "train.rows_per_step": 4,
    "train.eval_every": 5,
    "train.eval_rows": 16,
    "train.measure_speed": False,
    "sparsity.rate": 0.0,
    "sparsity.weights.density": 0.25,
    "sparsity.weights.block": 8,
    "sparsity.weights.update": "rigl",
    "sparsity.weights.update_every": 2,
    "sparsity.probe_tokens": 32,
    "checkpoint.every": 5,
    "checkpoint.keep": 9,
}


# A short run with one set of programs.
CONSTANT: dict[str, Any] = {
    "sparsity.schedule": "constant",
    "train.steps": 4,
    "train.eval_every": 0,
    "checkpoint.every": 0,
}


def overrides(changes: dict[str, Any]) -> list[str]:
    return [f"{key}={value}" for key, value in (BASE | changes).items()]


def settings(changes: dict[str, Any]) -> Config:
    return load(str(ROOT / "experiments/tiny.py"), overrides(changes))


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "unbroken"
    train(settings({}), path, lambda _: None)
    return path


def summary_of(path: Path) -> dict[str, Any]:
    summary: dict[str, Any] = json.loads((path / "summary.json").read_text())
    return summary


def test_blocks_grow_and_are_exchanged(unbroken: Path) -> None:
    steps = [r for r in read_metrics(unbroken / "metrics.jsonl") if "loss" in r]
    assert [r["stored_blocks"] for r in steps] == [0.25] * 6 + [0.625] * 3 + [1.0] * 3
    assert [r["omission_rate"] for r in steps] == [0.75] * 6 + [0.375] * 3 + [0.0] * 3
    exchanged = {r["step"]: r["blocks_exchanged"] for r in steps if "blocks_exchanged" in r}
    assert exchanged.keys() == {3, 5, 9}
    # At most what a cosine from 0.3 lets drop; a dropped block may return.
    assert 0 < exchanged[3] <= 0.225 and 0 < exchanged[5] <= 0.075
    assert steps[-1]["loss"] < steps[0]["loss"] - 0.5
    summary = summary_of(unbroken)
    # With four gradients of all blocks on 32 of a step's 128 tokens.
    assert 0.6 * summary["dense_flops"] < summary["spent_flops"] < 0.9 * summary["dense_flops"]
    assert [Path(f).name for f in summary["figures"]] == ["loss.png", "exchanged.png"]


def test_the_share_that_is_dropped_is_a_setting(tmp_path: Path) -> None:
    config = settings(CONSTANT | {"sparsity.weights.drop_fraction": 0.0})
    train(config, tmp_path, lambda _: None)
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert {r["blocks_exchanged"] for r in records if "blocks_exchanged" in r} == {0.0}


def test_checkpoints_hold_stored_blocks_alone(unbroken: Path) -> None:
    leaves = find(unbroken / "checkpoints", 5).leaves
    names = [n for n in leaves if n.endswith("layers/mlp/up/blocks")]
    assert {name.split("/layers")[0] for name in names} == {
        "params",
        *(f"optimizer/0/{field}" for field in ("counts", "mu", "nu")),
    }
    blocks, columns = (leaves[f"params/layers/mlp/up/{n}"].shape for n in ("blocks", "columns"))
    assert blocks == (*columns, 8, 8)
    assert not any(name.endswith("layers/mlp/up") for name in leaves)
    assert any(n == "params/layers/mlp/up" for n in find(unbroken / "checkpoints").leaves)


def test_a_run_continues_bit_by_bit(unbroken: Path, tmp_path: Path) -> None:
    path = tmp_path / "continued"
    shutil.copytree(unbroken, path)
    (path / "summary.json").unlink()
    for step in (10, STEPS):
        shutil.rmtree(path / "checkpoints" / str(step))
    lines: list[str] = []
    train(settings({}), path, lines.append)
    assert "continuing after step 5" in lines
    names = ("step", "loss", "eval_loss", "grad_norm", "blocks_exchanged", "stored_blocks")
    before, after = (
        [tuple(r.get(name) for name in names) for r in read_metrics(run / "metrics.jsonl")]
        for run in (unbroken, path)
    )
    assert after == before
    assert summary_of(path)["spent_flops"] == summary_of(unbroken)["spent_flops"]
    finished = [find(run / "checkpoints") for run in (path, unbroken)]
    arrays = [stored.read(finished[0].leaves) for stored in finished]
    for name in finished[0].leaves:
        np.testing.assert_array_equal(arrays[0][name], arrays[1][name], err_msg=name, strict=True)


def held_out_loss(model: Any, config: Config) -> float:
    held_out = open_split(set_up(config, lambda _: None).data, "held_out")
    (rows,) = in_order(held_out, 16, 16)
    logits = jax.jit(model)(*map(jnp.asarray, (rows.tokens, rows.segment_ids, rows.positions)))
    chosen = np.take_along_axis(np.asarray(logits), rows.targets[..., None], axis=-1)[..., 0]
    losses = np.log(np.exp(np.asarray(logits, np.float64)).sum(axis=-1)) - chosen
    return float(losses[rows.loss_mask].mean())


def test_the_model_of_a_checkpoint_and_the_exported_one_are_dense(
    unbroken: Path, tmp_path: Path
) -> None:
    losses = {
        r["step"]: r["eval_loss"]
        for r in read_metrics(unbroken / "metrics.jsonl")
        if "eval_loss" in r
    }
    model = sat_jax.load_model(unbroken, step=5)
    assert_close(held_out_loss(model, settings({})), losses[5], "float32", "forward")
    never = {"sparsity.weights.update": "none", "sparsity.weights.update_every": 100}
    config = settings(CONSTANT | never)
    summary = train(config, tmp_path / "sparse", lambda _: None)
    exported = sat_jax.load_model(tmp_path / "sparse" / "huggingface")
    assert_close(held_out_loss(exported, config), summary["eval_loss"], "float32", "forward")


@pytest.mark.parametrize(
    "mesh",
    [
        "mesh.data=2 mesh.fsdp=2 mesh.tensor=2",
        "mesh.pipeline=2 mesh.tensor=2 mesh.data=2 train.accumulate=2",
    ],
)
def test_every_mesh_trains_the_same(
    unbroken: Path, mesh: str, tmp_path: Path, run_python: RunPython
) -> None:
    only_losses = {"train.eval_every": 0, "checkpoint.every": 0, "export.huggingface": False}
    arguments = [f"--config.{part}" for part in mesh.split()]
    arguments += [f"--config.{override}" for override in overrides(only_losses)]
    done = run_python(
        *("-m", "scripts.train", "--config=experiments/tiny.py", f"--workdir={tmp_path / 'run'}"),
        *arguments,
        devices=8,
    )
    assert done.returncode == 0, done.stderr
    expected, actual = (
        [(r["loss"], r.get("blocks_exchanged")) for r in read_metrics(path) if "loss" in r]
        for path in (unbroken / "metrics.jsonl", tmp_path / "run" / "metrics.jsonl")
    )
    assert [exchanged for _, exchanged in actual] == [exchanged for _, exchanged in expected]
    losses = [[loss for loss, _ in run] for run in (actual, expected)]
    assert_close(losses[0], losses[1], "float32", "forward")


COLLECTIVES = """
import json, re
import jax
from sat_jax.config_values import from_config_dict
from sat_jax.models.gpt2 import GPT2Config
from sat_jax.parallel.mesh import make_mesh
from sat_jax.train.programs import Programs
from sat_jax.train.setup import controller_of

config = from_config_dict({
    "train": {"steps": 4, "rows_per_step": 2},
    "data": {"row_length": 16},
    "sparsity": {"schedule": "constant", "weights": {"density": 0.25, "block": 8}},
    "mesh": {"tensor": 2, "data": 1},
})
model = GPT2Config(
    vocab_size=64, d_model=64, n_layers=2, n_heads=4, d_ff=128, max_positions=64
)
controller = controller_of(config, model)
programs = Programs(config, model, make_mesh(config.mesh, jax.devices()[:2]), controller)
text = programs.lower_step(controller.rungs[0].plan).compile().as_text()
names = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
print(json.dumps(re.findall(rf"= (\\S+?)(?:{{\\S*}})? ({names})\\(", text)))
programs.close()
"""


def test_no_weight_moves_where_block_rows_are_split(run_python: RunPython) -> None:
    """A step adds activations of two devices, 2 rows of 16 tokens, and moves nothing else."""
    done = run_python("-c", COLLECTIVES, devices=8)
    assert done.returncode == 0, done.stderr
    collectives = json.loads(done.stdout)
    assert len(collectives) > 4
    assert {name for _, name in collectives} == {"all-reduce"}
    assert {shape for shape, _ in collectives} <= {"f32[2,16,64]", "f32[2,16]"}
