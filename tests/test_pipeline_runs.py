"""Runs with a pipeline: the losses of one device, resume, and checkpoints on another mesh, also one
that splits the tokens of a row."""

from pathlib import Path

import pytest

from sat_jax.config_values import load
from sat_jax.train.loop import train
from sat_jax.train.metrics import read_metrics
from tests.conftest import ROOT, RunPython
from tests.tolerances import assert_close

SETTINGS = [
    "data.row_length=16",
    "train.steps=6",
    "train.rows_per_step=4",
    "train.accumulate=2",
    "train.eval_every=3",
    "train.eval_rows=4",
    "train.measure_speed=False",
    "sparsity.rungs=1",
    "sparsity.refresh_every=2",
    "sparsity.probe_tokens=16",  # one row, which no pipeline could split
    "sparsity.metric=taylor",
    "checkpoint.every=3",
]


# A run, and another that continues from its first checkpoint.
ON_TWO_DEVICES = """
import shutil, sys
from pathlib import Path
from sat_jax.config_values import load
from sat_jax.train.loop import train

directory, config = Path(sys.argv[1]), load("experiments/tiny.py", sys.argv[2:])
train(config, directory / "two", print)
stopped = directory / "stopped"
shutil.copytree(directory / "two", stopped)
(stopped / "summary.json").unlink()
shutil.rmtree(stopped / "checkpoints" / "6")
train(config, stopped, print)
"""


@pytest.mark.slow
def test_a_run_has_the_losses_of_one_device_and_resumes_bitwise(
    run_python: RunPython, tmp_path: Path
) -> None:
    train(load(str(ROOT / "experiments/tiny.py"), SETTINGS), tmp_path / "one", lambda _: None)
    done = run_python("-c", ON_TWO_DEVICES, str(tmp_path), *SETTINGS, "mesh.pipeline=2", devices=2)
    assert done.returncode == 0, done.stderr
    assert "continuing after step 3\n" in done.stdout
    one, two, again = (
        read_metrics(tmp_path / name / "metrics.jsonl") for name in ("one", "two", "stopped")
    )
    assert [record.get("kept_channels") for record in two[1:]] == [
        record.get("kept_channels") for record in one[1:]
    ]
    for name in ("loss", "eval_loss"):
        actual, desired = ([r[name] for r in records if name in r] for records in (two, one))
        assert_close(actual, desired, "float32", "forward")
    for name in ("loss", "eval_loss", "grad_norm"):
        assert [r.get(name) for r in again] == [r.get(name) for r in two], name


ON_ANOTHER_MESH = """
import sys
from pathlib import Path
import jax, numpy as np
from sat_jax.config_values import from_config_dict
from sat_jax.data.batch import Batch
from sat_jax.models.build import initial_values
from sat_jax.models.llama import LlamaConfig
from sat_jax.parallel.mesh import make_mesh
from sat_jax.sparsity.execution.state import PARAMS, new_state
from sat_jax.train.checkpoint import Checkpoints
from sat_jax.train.programs import Programs
from sat_jax.train.setup import controller_of
from tests.tolerances import assert_close

rows, length = 4, 8
model = LlamaConfig(
    vocab_size=32, d_model=8, n_layers=4, n_heads=4, n_kv_heads=2, head_dim=4, d_ff=8,
    max_positions=64,
)

class OnMesh:
    def __init__(self, **mesh):
        self.config = from_config_dict({
            "train": {"steps": 4, "rows_per_step": rows, "accumulate": 2},
            "data": {"row_length": length},
            "optimizer": {"learning_rate": 1e-2},
            "sparsity": {"rate": 0.5, "schedule": "constant", "metric": "magnitude"},
            "mesh": mesh,
        })
        devices = jax.devices()[: self.config.mesh.pipeline * self.config.mesh.context]
        controller = controller_of(self.config, model)
        mesh = make_mesh(self.config.mesh, devices)
        self.programs = Programs(self.config, model, mesh, controller)
        self.rung = self.programs.rung(controller.rungs[0].plan)

    def place(self, tree, like):
        return jax.device_put(tree, jax.tree.map(lambda leaf: leaf.sharding, like))

    def begin(self):
        form = self.programs.form(())
        full = jax.jit(lambda: new_state(initial_values(model, 0), form.optimizer))()
        return self.place(full, form.state)

    def train(self, full, steps):
        losses = []
        for step in steps:
            tokens = np.random.default_rng(step).integers(0, 32, (rows, length + 1), np.int32)
            positions = np.tile(np.arange(length, dtype=np.int32), (rows, 1))
            ones = np.ones((rows, length), np.int32)
            batch = Batch(tokens[:, :-1], tokens[:, 1:], ones, positions, ones > 0)
            stats = self.place(jax.jit(self.programs.no_statistics)(), self.programs.stats)
            kept = self.rung.select(full, stats).kept
            state, omitted = self.rung.compact(full, kept)
            batch = self.place(batch, self.programs.batch(rows))
            state, _, metrics = self.rung.step(state, stats, kept, batch, omitted[PARAMS], {})
            full = self.rung.expand(state, omitted, kept)
            losses.append(float(metrics.loss))
        return full, losses

    def save(self, full, path):
        with Checkpoints(path, 1) as checkpoints:
            checkpoints.save(2, full._asdict(), {})

    def restore(self, path):
        with Checkpoints(path, 1) as checkpoints:
            state = checkpoints.restore(self.programs.form(()).state._asdict()).state
        return self.programs.form(()).state._replace(**state)

meshes = OnMesh(), OnMesh(context=2), OnMesh(pipeline=2), OnMesh(pipeline=2, rounds=2)
expected = None
for number, mesh in enumerate(meshes):
    path = Path(sys.argv[1]) / str(number)
    full, before = mesh.train(mesh.begin(), range(2))
    mesh.save(full, path)
    following = meshes[(number + 1) % len(meshes)]
    _, after = following.train(following.restore(path), range(2, 4))
    expected = expected or before + after
    assert_close(before + after, expected, "float32", "forward")
for mesh in meshes:
    mesh.programs.close()
"""


@pytest.mark.slow
def test_a_checkpoint_continues_on_another_mesh(run_python: RunPython, tmp_path: Path) -> None:
    done = run_python("-c", ON_ANOTHER_MESH, str(tmp_path), devices=2)
    assert done.returncode == 0, done.stderr
