"""Whole sweeps: on this machine, and on a cluster that `fake_slurm.py` stands for."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from sat_jax.results.rows import read
from sat_jax.train.files import read_json
from sat_jax.train.metrics import read_metrics
from tests.conftest import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("default_signals")]

SETTINGS = (
    "data.row_length=32", "train.rows_per_step=4", "train.eval_every=0", "train.eval_rows=8",
    "sparsity.rate=0", "checkpoint.every=0", "export.huggingface=false",
)  # fmt: skip


def command(directory: Path, *arguments: str) -> list[str]:
    return [
        sys.executable, "-m", "scripts.sweep", "--config=experiments/tiny.py",
        f"--workdir={directory}", *(f"--config.{one}" for one in SETTINGS), *arguments,
    ]  # fmt: skip


def sweep(directory: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(directory, *arguments), cwd=ROOT, capture_output=True, text=True, timeout=600
    )


@contextmanager
def started(directory: Path, *arguments: str, **options: Any) -> Iterator[subprocess.Popen[str]]:
    """The command, in the middle of its work."""
    with subprocess.Popen(
        command(directory, *arguments), cwd=ROOT, stderr=subprocess.PIPE, text=True, **options
    ) as process:
        yield process


def wait_for(done: Callable[[], bool]) -> None:
    until = time.monotonic() + 300
    while not done():
        assert time.monotonic() < until
        time.sleep(0.1)


def test_a_failing_run_stops_no_other_and_what_is_finished_is_skipped(tmp_path: Path) -> None:
    rates = ("--axis", "optimizer.learning_rate=1e-3,1e30,2e-3", "--config.train.steps=6")
    own = "--config.data.row_length=33"  # rows that no other test has prepared
    rows = f"--record={tmp_path / 'rows.jsonl'}"
    directory = tmp_path / "sweep"
    done = sweep(directory, *rates, own, "--workers=2", rows)
    assert done.returncode == 2
    *_, told, last = done.stderr.splitlines()
    assert last == "error: 1 of 3 runs failed; the same command tries again"
    assert "  optimizer.learning_rate=1e+30  failed: " in told and ": step 2 has loss " in told
    assert done.stderr.count("data: prepared") == 1
    quality, cost = done.stdout.split("\n\n")
    assert len(quality.splitlines()) == 4 and "learning rate 0.001: dense" in cost
    finished = {path.parent.name: path.stat() for path in directory.glob("*/summary.json")}
    runs = json.loads((directory / "sweep.json").read_text())["runs"]
    (bad,) = runs.keys() - finished.keys()
    assert runs[bad] == {"optimizer.learning_rate": 1e30}
    log = (directory / "logs" / f"{bad}.log").read_text().splitlines()
    assert log[-1].startswith("error: ") and log[-1].removeprefix("error: ") in told
    assert len(read(tmp_path / "rows.jsonl")) == 2

    fewer = ("--axis", "optimizer.learning_rate=1e-3,2e-3", "--config.train.steps=6")
    done = sweep(directory, *fewer, own, rows)
    assert done.returncode == 0, done.stderr
    assert "\n2 runs, 2 finished before; " in done.stderr
    assert {path.parent.name: path.stat() for path in directory.glob("*/summary.json")} == finished
    assert len(read(tmp_path / "rows.jsonl")) == 2  # not once more


def test_ctrl_c_stops_and_saves_and_the_same_command_continues(tmp_path: Path) -> None:
    arguments = ("--seeds=1", "--config.train.steps=600")
    with started(tmp_path, *arguments, start_new_session=True) as process:
        wait_for(lambda: any(len(read_metrics(m)) > 2 for m in tmp_path.glob("*/metrics.jsonl")))
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does, to all processes of it
        said = process.communicate(timeout=300)[1]
    assert process.returncode == 130, said
    assert said.splitlines()[-1] == "interrupted"
    (metrics,) = tmp_path.glob("*/metrics.jsonl")
    stopped = read_metrics(metrics)[-1]["step"]
    assert 0 < stopped < 600 and not (metrics.parent / "summary.json").exists()
    done = sweep(tmp_path, *arguments)
    assert done.returncode == 0, done.stderr
    log = (tmp_path / "logs" / f"{metrics.parent.name}.log").read_text()
    assert f"continuing after step {stopped}\n" in log
    assert read_metrics(metrics)[-1]["step"] == 600


def test_slurm_runs_an_array_and_a_job_out_of_time_is_queued_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    programs, state = tmp_path / "bin", tmp_path / "state"
    for folder in (programs, state):
        folder.mkdir()
    for name in ("sbatch", "srun", "sacct", "scontrol"):
        program = programs / name
        program.write_text(
            f'#!/bin/sh\nexec {sys.executable} {ROOT}/tests/fake_slurm.py {name} "$@"\n'
        )
        program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    monkeypatch.setenv("FAKE_SLURM", str(state))
    directory = tmp_path / "sweep"
    arguments = (
        "--seeds=2", "--launcher=slurm", "--workers=2",
        # Long enough to be at work when its time is up.
        "--config.train.steps=1000", "--config.train.log_every=10",
        "--slurm", "time=60,partition=long,gpus_per_node=1",
    )  # fmt: skip
    # The first command hands over and goes; a second one finds its jobs and does not submit again.
    with started(directory, *arguments) as process:
        wait_for(lambda: len(list(state.glob("*.pid"))) == 2)
        process.send_signal(signal.SIGINT)
        said = process.communicate(timeout=300)[1]
    assert process.returncode == 130 and "the jobs continue" in said, said
    script = (state / "script.sh").read_text()
    for line in ("--array=0-1%2", "--time=60", "--partition=long", "--gpus-per-node=1"):
        assert f"#SBATCH {line}\n" in script

    jobs = {job: run for run, job in read_json(directory / "jobs.json").items()}
    metrics = directory / jobs["77_0"] / "metrics.jsonl"
    wait_for(lambda: metrics.exists() and len(read_metrics(metrics)) > 2)
    os.kill(int((state / "0.pid").read_text()), signal.SIGUSR2)
    done = sweep(directory, *arguments)
    assert done.returncode == 0, done.stderr
    assert (state / "0.requeued").exists()
    assert done.stdout.splitlines()[2].split()[:2] == ["dense", "2"]
    logs = [path.read_text() for path in (directory / "logs").glob("*.log")]
    assert sorted("continuing after step " in log for log in logs) == [False, True]
    assert len(list((directory / "logs" / "slurm").glob("*_submission.sh"))) == 1
    for path in directory.glob("*/metrics.jsonl"):
        assert [r["step"] for r in read_metrics(path)] == list(range(0, 1001, 10))
