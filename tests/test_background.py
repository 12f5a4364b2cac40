"""Across a ladder no step traces or compiles on the main thread."""

import threading
import time
from pathlib import Path
from typing import Any

import jax
import pytest

from sat_jax.config_values import load
from sat_jax.train.loop import train
from sat_jax.train.working import Working
from tests.conftest import ROOT


@pytest.mark.slow
def test_steps_never_wait_for_the_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[tuple[str, bool, float]] = []
    steps: list[float] = []

    def listen(event: str, seconds: float, **_: Any) -> None:
        del seconds
        on_main = threading.current_thread() is threading.main_thread()
        events.append((event, on_main, time.perf_counter()))

    plain = Working.step

    def timed(self: Working, batch: Any) -> Any:
        steps.append(time.perf_counter())
        return plain(self, batch)

    jax.monitoring.register_event_duration_secs_listener(listen)
    monkeypatch.setattr(Working, "step", timed)
    monkeypatch.chdir(ROOT)
    config = load(
        "experiments/tiny.py",
        [
            "train.steps=9",
            "train.rows_per_step=2",
            "train.eval_every=2",
            "train.eval_rows=2",
            "sparsity.refresh_every=2",
            "checkpoint.every=3",
            "export.huggingface=false",
        ],
    )
    summary = train(config, tmp_path / "run", print)
    assert len(summary["rungs"]) == 3 and len(steps) == 9

    compiled = [event for event in events if event[0].startswith("/jax/core/compile")]
    assert any(not on_main for _, on_main, _ in compiled)  # or nothing was listened to
    late = [e for e, on_main, at in compiled if on_main and steps[0] < at < steps[-1]]
    assert late == []
