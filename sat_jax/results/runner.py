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

    def end(self, stopping: bool) -> None:
        """Drop the job, which has ended; `stopping`: the sweep was asked to stop."""
        self.job = None
        if not self.finished and not stopping:
            self.error = failure(self.log)

    def state(self) -> str:
        """Return how the run ended."""
        if self.error:
            return f"failed: {self.error} (log: {self.log})"
        return f"{'finished' if self.finished else 'stopped'}  {self.progress()}"

    def text(self, names: Mapping[str, str]) -> str:
        """Return name and settings, with the `names` of their paths."""
        return f"{self.run.name}  {settings_text(self.run.settings, names)}"

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
    """Run all runs that are not finished, to their end, with a line on stderr when a run starts or
    ends, and for each running one every 30 seconds.

    `finished` is called in this process with each finished run. Raises `KeyboardInterrupt` when
    asked to stop: local runs have saved, and jobs of a cluster continue.
    """
    # Seeds share compiled programs: side by side each would compile them.
    runs = sorted(runs, key=lambda run: run.run.config.seed)
    names = short_names(path for run in runs for path in run.run.settings)
    before = [run for run in runs if run.finished]
    for run in before:
        finished(run)
    _print(f"{len(runs)} runs in {folder.path}, {len(before)} finished before")
    stopping, shown = False, time.monotonic()
    ids = folder.job_ids()
    try:
        with Interrupt() as interrupt:
            for run in runs:  # jobs that an earlier command submitted to a cluster
                if run.waiting and run.run.name in ids:
                    run.job = launcher.attach(ids[run.run.name])
            while any(run.job or (run.waiting and not stopping) for run in runs):
                if interrupt.requested(0) and not stopping:
                    _stop(launcher)
                    stopping = True
                for run in [] if stopping else _start(folder, runs, launcher):
                    _print(f"{run.text(names)}  started")
                for run in runs:
                    if run.job is not None and run.job.done():
                        run.end(interrupt.requested(0))
                        if run.finished:
                            finished(run)
                        _print(f"{run.text(names)}  {run.state()}")
                if time.monotonic() - shown >= _PROGRESS_SECONDS:
                    shown = time.monotonic()
                    for run in runs:
                        if run.job is not None:
                            _print(f"{run.text(names)}  {run.progress()}")
                time.sleep(launcher.seconds)
    except BaseException:
        launcher.stop()  # the second request ends runs at once
        raise
    if stopping:
        raise KeyboardInterrupt


def _start(folder: SweepDir, runs: Sequence[SweepRun], launcher: Launcher) -> list[SweepRun]:
    starting = [run for run in runs if run.waiting][: launcher.room()]
    if starting:
        jobs = launcher.submit([Job(r.run.config, r.workdir.path, r.log) for r in starting])
        for run, job in zip(starting, jobs, strict=True):
            run.job = job
        if launcher.outlives:
            names = [run.run.name for run in starting]
            folder.add_jobs(dict(zip(names, [job.job_id for job in jobs], strict=True)))
    return starting


def _stop(launcher: Launcher) -> None:
    """Ask local runs to save and end; leave those of a cluster."""
    if launcher.outlives:
        _print("the jobs continue; the same command watches them, scancel ends them")
        raise KeyboardInterrupt
    _print("stopping: each run ends after its step and saves; again ends them now")
    launcher.stop()


def _print(line: str) -> None:
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()
