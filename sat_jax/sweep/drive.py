"""A sweep from its runs to its end: what is finished is skipped, the rest is started, watched and
recorded."""

import dataclasses
import json
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from sat_jax.errors import UserError
from sat_jax.sweep.board import Board, make_board
from sat_jax.sweep.launch import Job, Launcher, Submitted, failure
from sat_jax.sweep.runs import Run
from sat_jax.sweep.watch import State, Watched
from sat_jax.train.files import read_json, write_json
from sat_jax.train.interrupt import Interrupt
from sat_jax.train.workdir import WorkDir


class SweepDir:
    """The folder of a sweep: a work directory for each run under its name, `sweep.json` with what
    was asked and what the names mean, `jobs.json` with what a cluster was given, and `logs/`."""

    def __init__(self, path: Path):
        self.workdir = WorkDir(path)
        self.path = self.workdir.path
        self.logs = self.path / "logs"
        self._asked = self.path / "sweep.json"
        self._jobs = self.path / "jobs.json"

    def hold(self, stack: ExitStack) -> None:
        """Makes the folder and locks it. Raises `UserError` where another sweep has it, or it holds
        something else."""
        if self.workdir.config.exists():
            raise UserError(f"{self.path} holds a run; a sweep needs a folder of its own")
        stack.enter_context(self.workdir.lock())
        self.logs.mkdir(exist_ok=True)

    def watched(self, run: Run) -> Watched:
        """The run as it lies here."""
        return Watched(run, WorkDir(self.path / run.name), self.logs / f"{run.name}.log")

    def asked(self, command: Mapping[str, Any], runs: Sequence[Run]) -> None:
        """Adds a command and its runs to `sweep.json`."""
        before = self._read(self._asked)
        commands = [*before.get("commands", []), json.loads(json.dumps(command))]
        if commands[-1] in commands[:-1]:
            commands.pop()
        names = {run.name: dict(run.settings) for run in runs}
        write_json(self._asked, {"commands": commands, "runs": {**before.get("runs", {}), **names}})

    def job_ids(self) -> dict[str, str]:
        """Of the jobs that a cluster was given, by the name of the run."""
        return self._read(self._jobs)

    def given(self, jobs: Mapping[str, str]) -> None:
        """Adds jobs to those."""
        write_json(self._jobs, {**self.job_ids(), **jobs})

    def _read(self, path: Path) -> dict[str, Any]:
        return read_json(path) if path.exists() else {}


def drive(
    folder: SweepDir,
    watched: Sequence[Watched],
    launcher: Launcher,
    finished: Callable[[Run, dict[str, Any]], None],
) -> None:
    """Runs what is not finished, to the end of all. `finished` is called with each finished run and
    its summary, in this process. Raises `KeyboardInterrupt`, with all runs saved, when asked to
    stop; runs of a cluster go on."""
    with make_board(watched) as board, Interrupt() as interrupt:
        _Drive(folder, watched, launcher, finished, board, lambda: interrupt.asked(0)).run()


def by_turns(watched: Sequence[Watched]) -> list[Watched]:
    """The first seed of every variant before the second of any. Seeds have the same programs: side
    by side each would compile them, later ones find them in the cache."""
    seen = Counter[str]()
    turns = []
    for one in watched:
        turns.append(seen[one.run.group])
        seen[one.run.group] += 1
    return [one for _, one in sorted(zip(turns, watched, strict=True), key=lambda pair: pair[0])]


@dataclasses.dataclass
class _Drive:
    folder: SweepDir
    watched: Sequence[Watched]
    launcher: Launcher
    finished: Callable[[Run, dict[str, Any]], None]
    board: Board
    asked: Callable[[], bool]

    def run(self) -> None:
        waiting = self._settled()
        total, done = len(self.watched), len(self.watched) - len(waiting)
        self.board.say(f"{total} runs in {self.folder.path}, {done} of them finished before")
        self._running: dict[str, Submitted] = {}
        waiting = self._attach(waiting)
        try:
            while waiting or self._running:
                if self.asked():
                    self._stop()
                waiting = self._start(waiting)
                self._look()
                self.board.refresh()
                if waiting or self._running:
                    time.sleep(self.launcher.seconds)
        except BaseException:
            self.launcher.stop()  # a second time to those that were asked: they end at once
            raise

    def _settled(self) -> list[Watched]:
        """Tells of what has finished before; returns the others."""
        for one in self.watched:
            one.look()
            if one.state is State.FINISHED:
                self._tell_finished(one)
        return [one for one in by_turns(self.watched) if one.state is State.WAITING]

    def _attach(self, waiting: list[Watched]) -> list[Watched]:
        """Finds the jobs that an earlier command left in a cluster's hands."""
        ids = self.folder.job_ids()
        for one in waiting:
            job = self.launcher.attach(ids[one.run.name]) if one.run.name in ids else None
            if job is not None:
                self._begin(one, job)
        return [one for one in waiting if one.state is State.WAITING]

    def _start(self, waiting: list[Watched]) -> list[Watched]:
        count = min(self.launcher.room(), len(waiting))
        if not count:
            return waiting
        now, later = waiting[:count], waiting[count:]
        jobs = self.launcher.submit([Job(o.run.config, o.workdir.path, o.log) for o in now])
        if self.launcher.outlives:
            given = {one.run.name: job.job_id for one, job in zip(now, jobs, strict=True)}
            self.folder.given(given)
        for one, job in zip(now, jobs, strict=True):
            self._begin(one, job)
        return later

    def _begin(self, one: Watched, job: Submitted) -> None:
        self._running[one.run.name] = job
        one.state = State.RUNNING
        self.board.changed(one)

    def _look(self) -> None:
        for one in self.watched:
            job = self._running.get(one.run.name)
            if job is None:
                continue
            ended = job.done()
            one.look()
            if ended:
                del self._running[one.run.name]
                self._end(one, job)

    def _end(self, one: Watched, job: Submitted) -> None:
        if one.workdir.summary.exists():
            one.state = State.FINISHED
            self._tell_finished(one)
        elif job.paths.result_pickle.exists():
            one.state, one.error = State.FAILED, failure(job)
        elif self.asked():
            one.state = State.STOPPED
        else:
            one.state, one.error = State.FAILED, "killed: its process ended without a word"
        self.board.changed(one)

    def _tell_finished(self, one: Watched) -> None:
        summary = one.workdir.finished()
        assert summary is not None
        self.finished(one.run, summary)

    def _stop(self) -> None:
        """Ends the sweep; the runs of this machine first save."""
        if self.launcher.outlives:
            self.board.say("the jobs go on; the same command watches them, scancel ends them")
            raise KeyboardInterrupt
        self.board.say("stopping: each run ends after its step and saves; once more ends them now")
        self.launcher.stop()
        while self._running:
            self._look()
            self.board.refresh()
            time.sleep(self.launcher.seconds)
        raise KeyboardInterrupt
