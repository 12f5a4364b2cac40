"""Progress of a sweep as lines on the terminal or in a log."""

import sys
import time
from collections.abc import Sequence
from typing import TextIO

from sat_jax.results.sweep import settings_text, short_names
from sat_jax.results.text import duration
from sat_jax.results.watch import State, WatchedRun
from sat_jax.train.progress import describe

_MEASURED = ("loss", "eval_loss", "tokens_per_second")


class Display:
    """Writes a line when the state of a run changes, and one per running run every `every`
    seconds."""

    def __init__(self, runs: Sequence[WatchedRun], stream: TextIO | None = None, every: float = 30):
        self._runs, self._stream, self._every = runs, stream or sys.stderr, every
        self._names = short_names(path for run in runs for path in run.run.settings)
        self._written = time.monotonic()

    def changed(self, run: WatchedRun) -> None:
        """Write the new state of a run."""
        ended = sum(other.state in (State.FINISHED, State.FAILED) for other in self._runs)
        state = run.state.value
        if run.state is State.FAILED:
            state = f"failed: {run.error} (log: {run.log})"
        elif run.state is State.FINISHED:
            progress = run.progress()
            state += f"  {describe({key: progress.get(key) for key in _MEASURED})}"
        self.write(f"[{ended}/{len(self._runs)}] {self._title(run)}  {state}")

    def refresh(self) -> None:
        """Write the progress of the running runs, if enough time has passed."""
        if time.monotonic() - self._written < self._every:
            return
        for run in self._runs:
            if run.state is State.RUNNING:
                progress = run.progress()
                left = duration(progress["seconds_left"]) if "seconds_left" in progress else "?"
                steps = f"step {progress['step']}/{run.steps}"
                self.write(f"{self._title(run)}  {steps}  {describe(progress)}  left {left}")
        self._written = time.monotonic()

    def write(self, line: str) -> None:
        """Write a line."""
        self._stream.write(line + "\n")
        self._stream.flush()

    def _title(self, run: WatchedRun) -> str:
        return f"{run.run.name}  {settings_text(run.run.settings, self._names)}"
