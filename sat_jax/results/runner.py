"""Runs a sweep: skips finished runs, starts the others, shows their progress."""

import dataclasses
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from sat_jax.errors import UserError
from sat_jax.results.launch import Job, Launcher, Submitted, failure
from sat_jax.results.planned import PlannedRun
from sat_jax.results.sweep import Comparison, settings_text, short_names
from sat_jax.train.files import read_json, write_json
from sat_jax.train.interrupt import Interrupt
from sat_jax.train.metrics import read_metrics
from sat_jax.train.progress import describe
from sat_jax.train.workdir import WorkDir

_PROGRESS_SECONDS = 30.0  # between two lines of progress of a run


@dataclasses.dataclass
class SweepRun:
    """A run of a sweep with its job, while it has one; `error` is the reason, in one line, if it
    failed."""

    run: PlannedRun
    workdir: WorkDir
    log: Path
    job: Submitted | None = None
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

    def progress(self) -> str:
        """Return the last step and the newest value of each metric."""
        newest: dict[str, Any] = {"step": 0}
        for record in read_metrics(self.workdir.metrics) if self.workdir.metrics.exists() else []:
            newest |= record
        return f"step {newest['step']}/{self.run.config.train.steps}  {describe(newest)}"


class SweepDir:
    """The folder of a sweep: a work directory for each run under its name, `sweep.json` with
    commands, runs and comparisons, `jobs.json` with the jobs of a cluster, and `logs/`."""

    def __init__(self, path: Path):
        self.workdir = WorkDir(path)
        self.path = self.workdir.path
        self.logs = self.path / "logs"
        self._contents = self.path / "sweep.json"
        self._jobs = self.path / "jobs.json"

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

    def add(
        self,
        command: Sequence[str],
        runs: Sequence[PlannedRun],
        comparisons: Sequence[Comparison] = (),
    ) -> None:
        """Add a command, its runs and its comparisons to `sweep.json`."""
        before = self._read(self._contents)
        commands = before.get("commands", [])
        if list(command) not in commands:
            commands.append(list(command))
        tables = {table["name"]: table for table in before.get("comparisons", [])}
        for comparison in comparisons:
            tables[comparison.name] = json.loads(json.dumps(dataclasses.asdict(comparison)))
        names = {**before.get("runs", {}), **{run.name: dict(run.settings) for run in runs}}
        contents = {"commands": commands, "runs": names, "comparisons": [*tables.values()]}
        write_json(self._contents, contents)

    def job_ids(self) -> dict[str, str]:
        """Return the ids of a cluster's jobs by the name of the run."""
        return self._read(self._jobs)

    def add_jobs(self, jobs: Mapping[str, str]) -> None:
        """Add jobs of a cluster."""
        write_json(self._jobs, {**self.job_ids(), **jobs})

    def _read(self, path: Path) -> dict[str, Any]:
        return read_json(path) if path.exists() else {}


def run_sweep(
    folder: SweepDir,
    runs: Sequence[SweepRun],
    launcher: Launcher,
    finished: Callable[[SweepRun], None],
) -> None:
    """Run all runs that are not finished, to their end.

    `finished` is called in this process with each finished run. Raises `KeyboardInterrupt` when
    asked to stop: local runs have saved, and jobs of a cluster continue.
    """
    with Interrupt() as interrupt:
        _Runner(folder, runs, launcher, finished, lambda: interrupt.asked(0)).run()


class _Runner:
    def __init__(
        self,
        folder: SweepDir,
        runs: Sequence[SweepRun],
        launcher: Launcher,
        finished: Callable[[SweepRun], None],
        stop_requested: Callable[[], bool],
    ):
        # Seeds share compiled programs: side by side each would compile them.
        self._runs = sorted(runs, key=lambda run: run.run.config.seed)
        self._folder, self._launcher = folder, launcher
        self._finished, self._stop_requested = finished, stop_requested
        self._names = short_names(path for run in runs for path in run.run.settings)
        self._shown = time.monotonic()

    def run(self) -> None:
        before = [run for run in self._runs if run.finished]
        for run in before:
            self._finished(run)
        _print(f"{len(self._runs)} runs in {self._folder.path}, {len(before)} finished before")
        self._attach()
        try:
            while self._waiting() or self._running():
                if self._stop_requested():
                    self._stop()
                self._start(self._waiting())
                self._update()
                if self._waiting() or self._running():
                    time.sleep(self._launcher.seconds)
        except BaseException:
            self._launcher.stop()  # the second request ends runs at once
            raise

    def _waiting(self) -> list[SweepRun]:
        return [run for run in self._runs if run.waiting]

    def _running(self) -> list[SweepRun]:
        return [run for run in self._runs if run.job is not None]

    def _attach(self) -> None:
        """Find the jobs that an earlier command submitted to a cluster."""
        ids = self._folder.job_ids()
        for run in self._waiting():
            if run.run.name in ids:
                run.job = self._launcher.attach(ids[run.run.name])

    def _start(self, waiting: Sequence[SweepRun]) -> None:
        starting = waiting[: self._launcher.room()]
        if not starting:
            return
        jobs = self._launcher.submit([Job(r.run.config, r.workdir.path, r.log) for r in starting])
        for run, job in zip(starting, jobs, strict=True):
            run.job = job
            self._show(run, "started")
        if self._launcher.outlives:
            ids = zip(starting, jobs, strict=True)
            self._folder.add_jobs({run.run.name: job.job_id for run, job in ids})

    def _update(self) -> None:
        for run in self._running():
            if run.job is not None and run.job.done():
                self._end(run)
        if time.monotonic() - self._shown >= _PROGRESS_SECONDS:
            self._shown = time.monotonic()
            for run in self._running():
                self._show(run, run.progress())

    def _end(self, run: SweepRun) -> None:
        run.job = None
        if run.finished:
            self._finished(run)
            self._show(run, f"finished  {run.progress()}")
        elif not self._stop_requested():
            run.error = failure(run.log)
            self._show(run, f"failed: {run.error} (log: {run.log})")

    def _show(self, run: SweepRun, text: str) -> None:
        _print(f"{run.run.name}  {settings_text(run.run.settings, self._names)}  {text}")

    def _stop(self) -> None:
        """End the sweep; local runs save first."""
        if self._launcher.outlives:
            _print("the jobs continue; the same command watches them, scancel ends them")
            raise KeyboardInterrupt
        _print("stopping: each run ends after its step and saves; again ends them now")
        self._launcher.stop()
        while self._running():
            self._update()
            time.sleep(self._launcher.seconds)
        raise KeyboardInterrupt


def _print(line: str) -> None:
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()
