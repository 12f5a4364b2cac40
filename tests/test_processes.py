"""One run in two processes, started as Open MPI would start them."""

import math
import os
import secrets
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from sat_jax import load_model
from sat_jax.nn.layout import flat_values
from sat_jax.train.checkpoint import find
from sat_jax.train.metrics import read_metrics
from tests.conftest import ROOT, RunPython, xla_flags
from tests.tolerances import assert_close

SETTINGS = [
    "--config.data.row_length=32",
    "--config.train.steps=6",
    "--config.train.rows_per_step=4",
    "--config.train.eval_every=4",
    "--config.train.eval_rows=6",
    "--config.sparsity.rungs=1",
    "--config.sparsity.refresh_every=2",
    "--config.sparsity.probe_tokens=64",
    "--config.sparsity.balance=2",
    "--config.checkpoint.every=4",
]


def command(workdir: Path, *more: str) -> list[str]:
    return ["-m", "scripts.train", "--config=experiments/tiny.py", f"--workdir={workdir}", *more]


def start_two(*arguments: str, devices: int = 1) -> list[subprocess.Popen[str]]:
    """Start both processes of a command, each with `devices` devices. The variables are those of
    Open MPI; jax derives the port of process 0 from the job's number."""
    job = 4096 * secrets.randbelow(4096)
    cluster = {
        "OMPI_MCA_orte_hnp_uri": f"{job}.0;tcp://127.0.0.1:1",
        "OMPI_COMM_WORLD_SIZE": "2",
        "XLA_FLAGS": xla_flags(devices),
    }
    return [
        subprocess.Popen(
            [sys.executable, *arguments],
            cwd=ROOT,
            env={
                **os.environ,
                **cluster,
                "OMPI_COMM_WORLD_RANK": str(rank),
                "OMPI_COMM_WORLD_LOCAL_RANK": str(rank),
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]


def run_two(*arguments: str, devices: int = 1) -> list[subprocess.CompletedProcess[str]]:
    """Return the results of both processes of a command."""
    started = start_two(*arguments, devices=devices)
    try:
        ended = [process.communicate(timeout=300) for process in started]
    finally:
        for process in started:
            process.kill()
    return [
        subprocess.CompletedProcess(process.args, process.returncode, *output)
        for process, output in zip(started, ended, strict=True)
    ]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process with one device."""
    path = tmp_path_factory.mktemp("runs") / "alone"
    done = subprocess.run(
        [sys.executable, *command(path, *SETTINGS)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return path


# A tensor group within each process, and rows of which each process has a half. One across both,
# which then read the same rows, is below.
@pytest.mark.slow
@pytest.mark.parametrize(
    "mesh",
    [{"fsdp": 2, "tensor": 2}, {"context": 2}],
    ids=lambda mesh: " ".join(mesh),
)
def test_two_processes_train_as_one(alone: Path, tmp_path: Path, mesh: dict[str, int]) -> None:
    sizes = [f"--config.mesh.{axis}={size}" for axis, size in mesh.items()]
    devices = math.prod(mesh.values()) // 2
    first, second = run_two(*command(tmp_path, *SETTINGS, *sizes, "--distributed"), devices=devices)
    assert first.returncode == 0, first.stderr
    assert second.returncode == 0, second.stderr
    assert "Held-out perplexity" in first.stdout
    assert "perplexity" not in second.stdout and "tok/s" not in second.stderr  # one talks

    records = [read_metrics(path / "metrics.jsonl") for path in (alone, tmp_path)]
    assert [r["step"] for r in records[1]] == [r["step"] for r in records[0]] == list(range(7))
    for expected, actual in zip(*records, strict=True):
        for name in ("loss", "eval_loss"):
            if name in expected:
                assert_close(actual[name], expected[name], "float32", "forward")
        for name in ("tokens", "kept_heads", "kept_channels"):
            assert actual.get(name) == expected.get(name)
    trained, exported = (flat_values(load_model(p / "huggingface")) for p in (alone, tmp_path))
    assert exported.keys() == trained.keys()
    for name, value in trained.items():
        away = np.linalg.norm(exported[name] - value) / np.linalg.norm(value)
        assert round(float(away), 2) == 0, name


@pytest.mark.slow
def test_a_refused_run_ends_in_every_process(tmp_path: Path) -> None:
    arguments = command(tmp_path / "run", "--config.data.row_length=99999", "--distributed")
    for process in run_two(*arguments):
        assert process.returncode == 2
        assert process.stderr.splitlines()[-1].startswith("error: "), process.stderr


@pytest.mark.slow
def test_without_a_cluster_there_is_one_line(tmp_path: Path, run_python: RunPython) -> None:
    done = run_python(*command(tmp_path / "run", "--distributed"))
    assert done.returncode == 2
    assert done.stderr.startswith("error: --distributed needs processes started by Slurm")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_sigterm_to_one_process_stops_and_saves_all(tmp_path: Path) -> None:
    # Of a dense run, which has the fewest programs to compile.
    long = ["--config.sparsity.rate=0.0", "--config.train.steps=100000"]
    arguments = command(tmp_path, *SETTINGS, *long, "--distributed")
    started = start_two(*arguments)
    try:
        assert started[0].stderr is not None
        while "loss" not in (line := started[0].stderr.readline()):
            assert line, started[0].wait()
        started[1].send_signal(signal.SIGTERM)
        output = [process.communicate(timeout=120)[1] for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [130, 130], output
    steps = find(tmp_path / "checkpoints").step
    assert f"stopped and saved after step {steps};" in output[0]
    assert read_metrics(tmp_path / "metrics.jsonl")[-1]["step"] == steps


@pytest.mark.slow
def test_two_processes_store_the_same_blocks(tmp_path: Path) -> None:
    """Blocks are exchanged, and become dense, as in a run of one process."""
    blocks = [
        "--config.sparsity.rate=0.0",
        "--config.sparsity.schedule=s2d",
        "--config.sparsity.weights.density=0.25",
        "--config.sparsity.weights.block=8",
        "--config.sparsity.weights.matrices=mlp",
        "--config.sparsity.weights.update=rigl",
        "--config.sparsity.weights.update_every=2",
        "--config.export.huggingface=False",
        "--config.train.measure_speed=False",
    ]
    one, two = tmp_path / "one", tmp_path / "two"
    done = subprocess.run(
        [sys.executable, *command(one, *SETTINGS, *blocks)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    split = ["--config.mesh.tensor=2", "--distributed"]
    for process in run_two(*command(two, *SETTINGS, *blocks, *split)):
        assert process.returncode == 0, process.stderr
    expected, actual = (read_metrics(path / "metrics.jsonl") for path in (one, two))
    for name in ("stored_blocks", "blocks_exchanged"):
        assert [r.get(name) for r in actual] == [r.get(name) for r in expected]
    losses = [[r["loss"] for r in records if "loss" in r] for records in (actual, expected)]
    assert_close(losses[0], losses[1], "float32", "forward")
