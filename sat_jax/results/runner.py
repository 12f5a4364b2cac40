"""Runs a sweep: skips finished runs, starts the others, watches and records them."""

import dataclasses
import json
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from sat_jax.errors import UserError
from sat_jax.results.display import Display
from sat_jax.results.launch import Job, Launcher, Submitted, failure
from sat_jax.results.planned import PlannedRun
from sat_jax.results.sweep import Comparison
from sat_jax.results.watch import State, WatchedRun
from sat_jax.train.files import read_json, write_json
from sat_jax.train.interrupt import Interrupt
from sat_jax.train.workdir import WorkDir


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

    def watch(self, run: PlannedRun) -> WatchedRun:
        """Return the run with the state of its work directory."""
        return WatchedRun(run, WorkDir(self.path / run.name), self.logs / f"{run.name}.log")

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
        tables = before.get("comparisons", [])
        for comparison in comparisons:
            table = json.loads(json.dumps(dataclasses.asdict(comparison)))
            tables = [known for known in tables if known["name"] != comparison.name] + [table]
        names = {**before.get("runs", {}), **{run.name: dict(run.settings) for run in runs}}
        write_json(self._contents, {"commands": commands, "runs": names, "comparisons": tables})

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
    runs: Sequence[WatchedRun],
    launcher: Launcher,
    finished: Callable[[PlannedRun, dict[str, Any]], None],
) -> None:
    """Run all runs that are not finished, to their end.

    `finished` is called in this process with each finished run and its summary. Raises
    `KeyboardInterrupt` when asked to stop: local runs have saved, and jobs of a cluster continue.
    """
    with Interrupt() as interrupt:
        _Runner(
            folder, runs, launcher, finished, Display(runs), lambda: interrupt.requested(0)
        ).run()


def first_seeds_first(runs: Sequence[WatchedRun]) -> list[WatchedRun]:
    """Order runs so that the first seed of every variant precedes the second of any.

    Seeds share compiled programs: side by side each would compile them.
    """
    seen = Counter[str]()
    turns = []
    for run in runs:
        turns.append(seen[run.run.variant])
        seen[run.run.variant] += 1
    return [run for _, run in sorted(zip(turns, runs, strict=True), key=lambda pair: pair[0])]


@dataclasses.dataclass
class _Runner:
    folder: SweepDir
    runs: Sequence[WatchedRun]
    launcher: Launcher
    finished: Callable[[PlannedRun, dict[str, Any]], None]
    display: Display
    stop_requested: Callable[[], bool]
    jobs: dict[str, Submitted] = dataclasses.field(default_factory=dict)  # by the run's name

    def run(self) -> None:
        for run in self.runs:
            if run.state is State.FINISHED:
                self._report_finished(run)
        waiting = self._waiting()
        total, done = len(self.runs), len(self.runs) - len(waiting)
        self.display.write(f"{total} runs in {self.folder.path}, {done} of them finished before")
        self._attach(waiting)
        try:
            while self._waiting() or self.jobs:
                if self.stop_requested():
                    self._stop()
                self._start(self._waiting())
                self._update()
                if self._waiting() or self.jobs:
                    time.sleep(self.launcher.seconds)
        except BaseException:
            self.launcher.stop()  # the second request ends runs at once
            raise

    def _waiting(self) -> list[WatchedRun]:
        return [run for run in first_seeds_first(self.runs) if run.state is State.WAITING]

    def _attach(self, waiting: Sequence[WatchedRun]) -> None:
        """Find the jobs that an earlier command submitted to a cluster."""
        ids = self.folder.job_ids()
        for run in waiting:
            job = self.launcher.attach(ids[run.run.name]) if run.run.name in ids else None
            if job is not None:
                self._begin(run, job)

    def _start(self, waiting: Sequence[WatchedRun]) -> None:
        starting = waiting[: self.launcher.room()]
        if not starting:
            return
        jobs = self.launcher.submit([Job(r.run.config, r.workdir.path, r.log) for r in starting])
        pairs = list(zip(starting, jobs, strict=True))
        if self.launcher.outlives:
            self.folder.add_jobs({run.run.name: job.job_id for run, job in pairs})
        for run, job in pairs:
            self._begin(run, job)

    def _begin(self, run: WatchedRun, job: Submitted) -> None:
        self.jobs[run.run.name] = job
        run.state = State.RUNNING
        self.display.changed(run)

    def _update(self) -> None:
        for run in self.runs:
            job = self.jobs.get(run.run.name)
            if job is not None and job.done():
                del self.jobs[run.run.name]
                self._end(run, job)
        self.display.refresh()

    def _end(self, run: WatchedRun, job: Submitted) -> None:
        if run.workdir.summary.exists():
            run.state = State.FINISHED
            self._report_finished(run)
        elif job.paths.result_pickle.exists():
            run.state, run.error = State.FAILED, failure(job)
        elif self.stop_requested():
            run.state = State.STOPPED
        else:
            run.state, run.error = State.FAILED, "killed: its process ended without an error"
        self.display.changed(run)

    def _report_finished(self, run: WatchedRun) -> None:
        summary = run.workdir.finished()
        assert summary is not None
        self.finished(run.run, summary)

    def _stop(self) -> None:
        """End the sweep; local runs save first."""
        if self.launcher.outlives:
            self.display.write(
                "the jobs continue; the same command watches them, scancel ends them"
            )
            raise KeyboardInterrupt
        self.display.write("stopping: each run ends after its step and saves; again ends them now")
        self.launcher.stop()
        while self.jobs:
            self._update()
            time.sleep(self.launcher.seconds)
        raise KeyboardInterrupt
