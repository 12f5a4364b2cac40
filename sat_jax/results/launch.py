"""Launchers of a sweep's runs: on this machine, or on Slurm as an array of jobs, through submitit.

Every run is an ordinary training in a process of its own.
"""

import dataclasses
import multiprocessing
import os
import re
import signal
import sys
from collections.abc import Mapping, Sequence
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any, TypeAlias

import jax
import submitit
from submitit.core.utils import FailedJobError

from sat_jax.cli import run
from sat_jax.config import Config
from sat_jax.errors import UserError
from sat_jax.train.files import read_json, write_json
from sat_jax.train.loop import train

_REQUEUES = 20  # of a job that reaches its time limit, each time after a checkpoint
_ALIVE = ("PENDING", "RUNNING", "REQUEUED", "COMPLETING", "CONFIGURING", "SUSPENDED")


@dataclasses.dataclass(frozen=True)
class Job:
    """A run to start; `devices` are the ids of its CUDA devices, None: all that are visible."""

    config: Config
    directory: Path
    log: Path
    devices: str | None = None

    def start(self) -> SpawnProcess:
        """Start the run in a new process. After SIGTERM it saves a checkpoint and ends."""
        process = multiprocessing.get_context("spawn").Process(target=self._train)
        # Not for the run: Ctrl-C reaches every process of a terminal, and the signal of Slurm
        # before a time limit reaches every process of a job. A new process ignores them as well.
        ignored = (signal.SIGINT, signal.SIGUSR2)
        handlers = [signal.signal(number, signal.SIG_IGN) for number in ignored]
        process.start()
        for number, handler in zip(ignored, handlers, strict=True):
            signal.signal(number, handler)
        return process

    def _train(self) -> None:
        with self.log.open("a", encoding="utf-8") as file:
            for stream in (sys.stdout, sys.stderr):
                os.dup2(file.fileno(), stream.fileno())
        if self.devices is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = self.devices
            jax.config.update("jax_platforms", "cuda")
        run(lambda: train(self.config, self.directory, _log))


def _log(line: str) -> None:
    sys.stderr.write(f"{line}\n")


def failure(log: Path) -> str:
    """Return the last line of the log of a run that ended without finishing."""
    lines = log.read_text(encoding="utf-8").splitlines() if log.is_file() else []
    return lines[-1].removeprefix("error: ") if lines else "no output"


class Local:
    """Runs `workers` jobs at a time on this machine, each with an equal share of `gpus` (ids)."""

    outlives = False  # whether jobs continue when the sweep's command ends
    seconds = 0.5  # between two polls of the jobs

    def __init__(self, workers: int = 1, gpus: Sequence[str] = ()):
        if len(gpus) % workers:
            raise UserError(f"--gpus {','.join(gpus)} are not shared evenly by --workers {workers}")
        self._devices = [",".join(gpus[worker::workers]) or None for worker in range(workers)]
        self._processes: dict[int, SpawnProcess] = {}

    def free_slots(self) -> int:
        """Return how many more jobs may be submitted now."""
        return len(self._idle())

    def submit(self, jobs: Sequence[Job]) -> list[SpawnProcess]:
        """Start jobs, at most `free_slots()`."""
        workers = self._idle()[: len(jobs)]
        for worker, job in zip(workers, jobs, strict=True):
            job = dataclasses.replace(job, devices=self._devices[worker])
            self._processes[worker] = job.start()
        return [self._processes[worker] for worker in workers]

    def done(self, process: SpawnProcess) -> bool:
        """Return whether the process of a job has ended."""
        return not process.is_alive()

    def stop(self) -> None:
        """Ask the jobs to save and end; a second request ends them at once."""
        for process in self._processes.values():
            process.terminate()

    def _idle(self) -> list[int]:
        running = {worker for worker, p in self._processes.items() if p.is_alive()}
        return [worker for worker in range(len(self._devices)) if worker not in running]


class _RequeuedJob:
    """A job as submitit calls it: before the time limit submitit calls `checkpoint` and queues what
    that returns."""

    def __init__(self, job: Job):
        self._job = job

    def __call__(self) -> None:
        self._process = self._job.start()
        self._process.join()

    def checkpoint(self) -> submitit.helpers.DelayedSubmission:
        self._process.terminate()
        self._process.join()
        return submitit.helpers.DelayedSubmission(_RequeuedJob(self._job))


class Slurm:
    """Submits an array of jobs, at most `workers` at a time (None: the cluster's limit), with the
    options of sbatch that `slurm_options` returns. `folder` is that of the sweep; its `jobs.json`
    has the ids of the jobs by the name of the run."""

    outlives = True
    seconds = 5.0

    def __init__(self, folder: Path, options: Mapping[str, Any], workers: int | None = None):
        self._ids = folder / "jobs.json"
        try:
            executor = submitit.SlurmExecutor(folder / "logs" / "slurm", max_num_timeout=_REQUEUES)
            executor.update_parameters(**options)
        except (RuntimeError, ValueError, TypeError) as error:  # no Slurm, or wrong options
            raise UserError(f"--launcher slurm: {' '.join(str(error).split())}") from error
        if workers is not None:
            executor.update_parameters(array_parallelism=workers)
        self._executor = executor

    def free_slots(self) -> int:
        return sys.maxsize

    def submit(self, jobs: Sequence[Job]) -> list[submitit.Job[None]]:
        """Submit jobs, except those that an earlier command submitted and that wait or run."""
        ids = read_json(self._ids) if self._ids.exists() else {}
        names = [job.directory.name for job in jobs]
        handles = {n: job for n in names if n in ids and (job := self._running(ids[n]))}
        new = {name: job for name, job in zip(names, jobs, strict=True) if name not in handles}
        if new:
            try:
                array = self._executor.submit_array([*map(_RequeuedJob, new.values())])
            except FailedJobError as error:
                reason = str(error).strip().splitlines()[-1]
                raise UserError(f"--launcher slurm: sbatch refused: {reason}") from error
            handles |= dict(zip(new, array, strict=True))
            write_json(self._ids, ids | {name: handles[name].job_id for name in new})
        return [handles[name] for name in names]

    def _running(self, job_id: str) -> submitit.Job[None] | None:
        job = submitit.SlurmJob[None](self._executor.folder, job_id)
        state = job.watcher.get_state(job_id, mode="force").split()
        return job if state and state[0] in _ALIVE else None

    def done(self, job: submitit.Job[None]) -> bool:
        return job.done()

    def stop(self) -> None:
        pass


Launcher: TypeAlias = Local | Slurm


def slurm_options(texts: Sequence[str]) -> dict[str, Any]:
    """Return options of sbatch by name, from texts `name=value,name=value`.

    Raises `UserError` for a text of another form and a missing time limit.
    """
    options: dict[str, Any] = {}
    for part in (part for text in texts for part in re.split(r",(?=\w+=)", text)):
        name, separator, value = part.partition("=")
        if not separator or not value or name in options:
            raise UserError(f"--slurm {part}: accepted: NAME=VALUE, each name once")
        options[name] = int(value) if value.isdecimal() else value
    if not isinstance(options.get("time"), int):
        raise UserError("--slurm time=MINUTES is missing or not an integer")
    if "setup" in options:
        options["setup"] = [str(options["setup"])]
    return options
