"""Runs a sweep: skips finished runs and starts the others."""

import dataclasses
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from sat_jax.errors import UserError
from sat_jax.results.launch import Job, Launcher, failure
from sat_jax.results.planned import PlannedRun
from sat_jax.results.sweep import Comparison, settings_text
from sat_jax.train.files import read_json, write_json
from sat_jax.train.interrupt import Interrupt
from sat_jax.train.workdir import WorkDir


@dataclasses.dataclass
class SweepRun:
    """A run of a sweep with its job, while it has one; `error` is the reason, in one line, if it
    failed."""

    run: PlannedRun
    workdir: WorkDir
    log: Path
    job: Any = None
    error: str = ""

    @property
    def finished(self) -> bool:
        return self.workdir.summary.exists()

    @property
    def waiting(self) -> bool:
        return self.job is None and not self.error and not self.finished

    def check_finished(self, data: str) -> None:
        """Raise `UserError` if the run has finished on data of another fingerprint than `data`."""
        summary = self.workdir.finished()
        if summary is not None and summary["data"] != data:
            raise UserError(
                f"run {self.run.name} in {self.workdir.path.parent} has finished on data that have"
                " changed since (their text, or how they are prepared); accepted: another"
                " --workdir, or the old data"
            )

    def text(self) -> str:
        """Return name, settings and state."""
        state = "finished" if self.finished else "running" if self.job is not None else "stopped"
        if self.error:
            state = f"failed: {self.error} (log: {self.log})"
        return f"{self.run.name}  {settings_text(self.run.settings)}  {state}"


class SweepDir:
    """The folder of a sweep: a work directory for each run under its name, `sweep.json` with runs
    and comparisons, and `logs/`."""

    def __init__(self, path: Path):
        self.workdir = WorkDir(path)
        self.path = self.workdir.path
        self.logs = self.path / "logs"
        self._contents = self.path / "sweep.json"

    def lock(self, stack: ExitStack) -> None:
        """Make the folder and lock it. Raises `UserError` if another sweep uses it, or it holds
        something else."""
        if self.workdir.config.exists():
            raise UserError(f"{self.path} holds a run; a sweep needs a folder of its own")
        stack.enter_context(self.workdir.lock())
        self.logs.mkdir(exist_ok=True)

    def find(self, run: PlannedRun) -> SweepRun:
        """Return the run with its work directory."""
        return SweepRun(run, WorkDir(self.path / run.name), self.logs / f"{run.name}.log")

    def add(self, runs: Sequence[PlannedRun], comparisons: Sequence[Comparison] = ()) -> None:
        """Add runs and comparisons to `sweep.json`."""
        before = read_json(self._contents) if self._contents.exists() else {}
        tables = {table["name"]: table for table in before.get("comparisons", [])}
        tables |= {c.name: dataclasses.asdict(c) for c in comparisons}
        names = {**before.get("runs", {}), **{run.name: dict(run.settings) for run in runs}}
        write_json(self._contents, {"runs": names, "comparisons": [*tables.values()]})


def run_sweep(
    folder: SweepDir,
    runs: Sequence[SweepRun],
    launcher: Launcher,
    finished: Callable[[SweepRun], None],
    log: Callable[[str], None],
) -> None:
    """Run all runs that are not finished, to their end; `log` receives a line when a run starts or
    ends.

    `finished` is called in this process with each finished run. Raises `KeyboardInterrupt` when
    asked to stop: local runs have saved, and jobs of a cluster continue.
    """
    # Seeds share compiled programs: side by side each would compile them.
    runs = sorted(runs, key=lambda run: run.run.config.seed)
    before = [run for run in runs if run.finished]
    for run in before:
        finished(run)
    log(f"{len(runs)} runs, {len(before)} finished before; their output: {folder.logs}")
    stopping = False
    try:
        with Interrupt() as interrupt:
            while any(run.job or (run.waiting and not stopping) for run in runs):
                if interrupt.requested(0) and not stopping:
                    stopping = True
                    if launcher.outlives:
                        log("the jobs continue; the same command monitors them, scancel ends them")
                        break
                    log("stopping: each run ends after its step and saves; again ends them now")
                    launcher.stop()
                free = 0 if stopping else launcher.free_slots()
                starting = [run for run in runs if run.waiting][:free]
                jobs = [Job(run.run.config, run.workdir.path, run.log) for run in starting]
                for run, job in zip(starting, launcher.submit(jobs), strict=True):
                    run.job = job
                    log(run.text())
                for run in runs:
                    if run.job is not None and launcher.done(run.job):
                        run.job = None
                        if run.finished:
                            finished(run)
                        elif not interrupt.requested(0):
                            run.error = failure(run.log)
                        log(run.text())
                time.sleep(launcher.seconds)
    except BaseException:
        launcher.stop()  # the second request ends runs at once
        raise
    if stopping:
        raise KeyboardInterrupt
