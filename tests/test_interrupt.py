"""Runs that are stopped, diverge or fail: nothing is lost, and the error is one line."""

import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from sat_jax.config import Config
from sat_jax.config_values import load
from sat_jax.errors import UserError
from sat_jax.train.interrupt import Interrupt
from sat_jax.train.loop import Run, train
from sat_jax.train.metrics import read_metrics
from sat_jax.train.programs import Programs
from sat_jax.train.run_state import RunState
from tests.conftest import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("default_signals")]

SETTINGS: dict[str, Any] = {
    "data.row_length": 32,
    "train.steps": 6,
    "train.rows_per_step": 4,
    "train.eval_every": 0,
    "train.eval_rows": 8,
    "sparsity.rungs": 1,
    "sparsity.refresh_every": 2,
    "sparsity.probe_tokens": 64,
    "checkpoint.every": 0,
    "export.huggingface": False,
}


def settings(**changes: Any) -> Config:
    values = SETTINGS | {key.replace("__", "."): value for key, value in changes.items()}
    return load(str(ROOT / "experiments/tiny.py"), [f"{k}={v}" for k, v in values.items()])


@pytest.fixture(autouse=True)
def in_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)  # the texts are the project's own


def losses(path: Path) -> list[float]:
    return [r["loss"] for r in read_metrics(path / "metrics.jsonl") if "loss" in r]


AUTO = {
    "train__eval_every": 2,
    "sparsity__schedule": "auto",
    "sparsity__min_gain": 0.9,
    "sparsity__split": 0.9,
}
# Every layer draws from every batch; its draws must not depend on the step that a run restarts at.
DYNAMIC = {
    "sparsity__refresh_every": 0,
    "sparsity__metric": "maxip",
    "sparsity__selection": "sample",
    "sparsity__probe_tokens": 1024,
}


# Corrections are part of checkpoints: they are the same after the stop.
CORRECTED = {"sparsity__least_squares_correction": True}


@pytest.mark.parametrize(
    ("number", "changes", "sparse_steps"),
    [
        (signal.SIGINT, CORRECTED, 3),
        (signal.SIGTERM, AUTO, 4),
        (signal.SIGTERM, DYNAMIC, 3),
    ],
)
def test_a_stopped_run_goes_on_where_it_was(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    number: int,
    changes: dict[str, Any],
    sparse_steps: int,
) -> None:
    """Interrupted in the third step, between two refreshes, without a checkpoint due. With `auto`
    the loss after four steps is compared with that after two, from the checkpoint: the sparse rung
    ends one step earlier than scheduled."""
    before = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    plain, steps = RunState.step, 0

    def step(self: RunState, batch: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps == 3:
            os.kill(os.getpid(), number)
        return plain(self, batch)

    lines: list[str] = []
    with monkeypatch.context() as patch:
        patch.setattr(RunState, "step", step)
        with pytest.raises(KeyboardInterrupt):
            train(settings(**changes), tmp_path / "stopped", lines.append)
    assert lines[-1] == "stopped and saved after step 3; the same command continues"
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == before
    summary = train(settings(**changes), tmp_path / "stopped", lines.append)
    assert "continuing after step 3" in lines
    unbroken = train(settings(**changes), tmp_path / "unbroken", lines.append)
    assert [rung["steps"] for rung in summary["rungs"]] == [sparse_steps, 6 - sparse_steps]
    assert losses(tmp_path / "stopped") == losses(tmp_path / "unbroken")
    assert len(losses(tmp_path / "stopped")) == 6
    for name in ("eval_loss", "selections", "probes", "spent_flops"):
        assert summary[name] == unbroken[name]


def test_an_ignored_signal_stays_ignored() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with Interrupt() as interrupt:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.05)
        assert not interrupt.requested(1)
    assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN


def test_a_second_interrupt_stops_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def step(self: RunState, batch: Any) -> Any:
        del self, batch
        asking = signal.getsignal(signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        while signal.getsignal(signal.SIGINT) == asking:  # two at once may be heard as one
            time.sleep(0.001)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(60)
        raise AssertionError("the second one was not heard")

    monkeypatch.setattr(RunState, "step", step)
    with pytest.raises(KeyboardInterrupt):
        train(settings(), tmp_path / "run", print)
    assert not any((tmp_path / "run" / "checkpoints").iterdir())


def test_a_run_that_diverges_ends_with_its_sound_checkpoints(tmp_path: Path) -> None:
    config = settings(
        train__steps=24, optimizer__learning_rate=1e30, optimizer__warmup_steps=0,
        checkpoint__every=1,
    )  # fmt: skip
    for _ in range(2):  # the same command meets the same step
        with pytest.raises(UserError, match=r"step 2 has loss .*; earlier checkpoints are kept"):
            train(config, tmp_path / "run", print)
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["1"]
    assert not (tmp_path / "run" / "summary.json").exists()


@pytest.mark.parametrize(
    ("eval_every", "losses", "message", "saved"),
    [
        (0, [math.nan], "after step 0 the held-out loss is nan; the weights are damaged", []),
        # An evaluation precedes the save; without one, the loss is computed for the save.
        (1, [5.0, 5.0, math.inf], "after step 2 the held-out loss is inf; earlier", ["1"]),
        (0, [5.0, 5.0, math.nan], "after step 2 the held-out loss is nan; earlier", ["1"]),
    ],
)
def test_weights_without_a_finite_held_out_loss_are_not_saved(
    eval_every: int,
    losses: list[float],
    message: str,
    saved: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    values = iter(losses)
    monkeypatch.setattr(Run, "_held_out_loss", lambda *_: next(values))
    config = settings(train__steps=3, train__eval_every=eval_every, checkpoint__every=1)
    with pytest.raises(UserError, match=message):
        train(config, tmp_path / "run", print)
    folder = tmp_path / "run" / "checkpoints"
    assert [path.name for path in folder.iterdir()] == saved
    assert not (tmp_path / "run" / "huggingface").exists()


def test_a_perplexity_beyond_all_floats_ends_a_run_like_any_other(tmp_path: Path) -> None:
    config = settings(train__steps=3, optimizer__learning_rate=300, optimizer__warmup_steps=0)
    summary = train(config, tmp_path / "run", print)
    assert summary["eval_loss"] > 710 and summary["perplexity_after"] is None


def test_a_refused_start_leaves_no_settings(tmp_path: Path) -> None:
    for wrong in ({"data__sources": "none.md"}, {"data__row_length": 9999}, {"mesh__fsdp": 3}):
        with pytest.raises(UserError):
            train(settings(**wrong), tmp_path / "run", print)
    assert train(settings(train__steps=2), tmp_path / "run", print)["steps"] == 2


def test_an_attention_that_cannot_run_here_is_refused_first(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"model\.attention=splash: .*; accepted: xla"):
        train(settings(model__attention="splash"), tmp_path / "run", print)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["lock"]


def test_out_of_memory_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def step(self: RunState, batch: Any) -> Any:
        del self, batch
        return jax.jit(lambda: jnp.zeros((2**20, 2**20, 2**10)).at[0].set(1))()

    monkeypatch.setattr(RunState, "step", step)
    with pytest.raises(UserError, match=r"out of device memory: .*; to use less: "):
        train(settings(), tmp_path / "run", print)


def test_a_run_at_rates_that_omit_nothing_says_so(tmp_path: Path) -> None:
    lines: list[str] = []
    config = settings(train__steps=2, sparsity__dense_layers="0,1")
    train(config, tmp_path / "run", lines.append)
    assert any("these rates omit nothing" in line for line in lines)


def test_a_compilation_that_fails_ends_the_run_before_its_rung(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = Programs._compile_rung

    def compile_rung(self: Programs, plan: Any) -> Any:
        if plan.segments[0].kept("channel") == 128:
            raise RuntimeError("no program for the dense rung")
        return plain(self, plan)

    monkeypatch.setattr(Programs, "_compile_rung", compile_rung)
    with pytest.raises(RuntimeError, match="no program for the dense rung"):
        train(settings(train__steps=40), tmp_path / "run", print)
    assert len(losses(tmp_path / "run")) < 20


def test_an_interrupted_script_says_one_line(tmp_path: Path) -> None:
    arguments = [f"--config.{key}={value}" for key, value in SETTINGS.items()]
    with subprocess.Popen(
        [sys.executable, "-m", "scripts.train", "--config=experiments/tiny.py",
         f"--workdir={tmp_path / 'run'}", *arguments, "--config.train.steps=100000"],
        cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        assert process.stderr is not None
        while "loss" not in (line := process.stderr.readline()):
            assert line, process.wait()
        process.send_signal(signal.SIGINT)
        out, errors = process.communicate(timeout=120)
    assert process.returncode == 130 and out == ""
    lines = errors.splitlines()
    assert lines[-1] == "interrupted"
    assert lines[-2].startswith("stopped and saved after step ")
