"""Launchers of a sweep's runs, through submitit: on this machine, or on Slurm as an array of jobs.

Every job is an ordinary run in a process of its own.
"""

import dataclasses
import logging
import os
import re
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, TypeAlias

import jax
import submitit
from submitit.core.utils import FailedJobError

from sat_jax.config import Config
from sat_jax.errors import UserError
from sat_jax.train.loop import train

Submitted: TypeAlias = submitit.Job[None]

_NO_TIMEOUT = 60 * 24 * 365  # minutes
_REQUEUES = 20  # of a job that reaches its time limit, each time after a checkpoint
_ALIVE = ("PENDING", "RUNNING", "REQUEUED", "COMPLETING", "CONFIGURING", "SUSPENDED")


@dataclasses.dataclass(frozen=True)
class Job:
    """A run as submitit calls it; after a requeue it is called again and the run continues.

    `environment` sets variables of its process, or removes those that are None; `platform` is the
    kind of devices that it must use.
    """

    config: Config
    directory: Path
    log: Path
    environment: Mapping[str, str | None] = dataclasses.field(default_factory=dict)
    platform: str | None = None

    def __call__(self) -> None:
        """Train. A failure ends the log with its reason in one line. A run that is stopped ends the
        process."""
        with self.log.open("a", encoding="utf-8") as file:
            for stream in (sys.stdout, sys.stderr):
                stream.flush()
                os.dup2(file.fileno(), stream.fileno())
        logging.getLogger("submitit").setLevel(logging.WARNING)
        for name, value in self.environment.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
        if self.platform is not None:
            jax.config.update("jax_platforms", self.platform)
        with _Signals() as signals:
            try:
                train(self.config, self.directory, _log)
            except KeyboardInterrupt:
                signals.requeue()
                sys.exit(130)
            except UserError as error:
                _log(f"error: {' '.join(str(error).split())}")
            except Exception as error:
                traceback.print_exc()
                _log(f"error: {type(error).__name__}: {' '.join(str(error).split())}")

    def checkpoint(self) -> submitit.helpers.DelayedSubmission:
        """Return the job that runs after a requeue: the same one."""
        return submitit.helpers.DelayedSubmission(self)


def failure(log: Path) -> str:
    """Return the reason, in one line, why a run ended without finishing, from its log."""
    lines = log.read_text(encoding="utf-8").splitlines() if log.is_file() else []
    if lines and lines[-1].startswith("error: "):
        return lines[-1].removeprefix("error: ")
    return "its process ended without an error"


def _log(line: str) -> None:
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()


class _Signals:
    """Signal handling inside a job.

    SIGTERM stops the run with a checkpoint (submitit would ignore it). So does the signal before a
    time limit, after which submitit queues the job again.
    """

    def __enter__(self) -> "_Signals":
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        self._limit = signal.Signals[f"SIG{submitit.JobEnvironment.USR_SIG}"]
        self._submitit: Any = signal.signal(self._limit, self._near_time_limit)
        signal.signal(signal.SIGALRM, self._stop_run)
        self._requeue = False
        return self

    def __exit__(self, *_: object) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(self._limit, self._submitit)

    def requeue(self) -> None:
        """End the process and queue the job again, if it reached its time limit."""
        if self._requeue:
            self._submitit(self._limit, None)

    def _near_time_limit(self, number: int, frame: FrameType | None) -> None:
        self._requeue = True
        self._stop_run(number, frame)

    def _stop_run(self, number: int, frame: FrameType | None) -> None:
        """Send SIGTERM once the run handles it: before its first step, and while it saves, the
        signal would end it at once."""
        del number, frame
        if signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:
            signal.setitimer(signal.ITIMER_REAL, 0.1)
        else:
            os.kill(os.getpid(), signal.SIGTERM)


class Local:
    """Runs `workers` jobs at a time on this machine, each with an equal share of `gpus` (ids)."""

    outlives = False  # whether jobs continue when the sweep's command ends
    seconds = 0.5  # between two polls of the jobs

    def __init__(self, folder: Path, workers: int = 1, gpus: Sequence[int] = ()):
        if len(gpus) % workers or len(set(gpus)) < len(gpus):
            raise UserError(
                f"--gpus {','.join(map(str, gpus))} are not shared evenly by --workers {workers}"
            )
        # One folder per command: submitit names files by process ids, which recur.
        self._executor = submitit.LocalExecutor(folder / f"local-{time.time_ns()}")
        self._executor.update_parameters(timeout_min=_NO_TIMEOUT)
        self._jobs: list[Submitted | None] = [None] * workers
        share = len(gpus) // workers
        parts = [gpus[worker * share : (worker + 1) * share] for worker in range(workers)]
        self._gpus = [",".join(map(str, part)) for part in parts]

    def room(self) -> int:
        """Return how many more jobs may be submitted now."""
        return len(self._idle())

    def submit(self, jobs: Sequence[Job]) -> list[Submitted]:
        """Submit jobs, at most `room()`."""
        # Ctrl-C reaches every process of a terminal and would kill submitit's before the run
        # saves. They inherit that it is blocked, and are stopped by SIGTERM alone.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            return [
                self._submit(worker, job) for worker, job in zip(self._idle(), jobs, strict=False)
            ]
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def _submit(self, worker: int, job: Job) -> Submitted:
        # submitit hides all GPUs that were not requested from it.
        visible = self._gpus[worker] or os.environ.get("CUDA_VISIBLE_DEVICES")
        platform = "cuda" if self._gpus[worker] else None
        environment = {"CUDA_VISIBLE_DEVICES": visible}
        local_job = dataclasses.replace(job, environment=environment, platform=platform)
        submitted: Submitted = self._executor.submit(local_job)
        self._jobs[worker] = submitted
        return submitted

    def attach(self, job_id: str) -> Submitted | None:
        """Return a job that an earlier command submitted, if it waits or runs."""
        del job_id
        return None

    def stop(self) -> None:
        """Ask the jobs to save and end."""
        for job in self._jobs:
            if job is not None and not job.done():
                os.kill(int(job.job_id), signal.SIGTERM)  # submitit's process forwards it

    def _idle(self) -> list[int]:
        return [worker for worker, job in enumerate(self._jobs) if job is None or job.done()]


class Slurm:
    """Submits an array of jobs, at most `workers` at a time (None: the cluster's limit), with the
    options of sbatch that `slurm_options` returns."""

    outlives = True
    seconds = 5.0

    def __init__(self, folder: Path, options: Mapping[str, Any], workers: int | None = None):
        for program in ("sbatch", "srun"):
            if shutil.which(program) is None:
                raise UserError(
                    f"--launcher slurm: no {program} on PATH; accepted: a machine of a cluster"
                )
        self._executor = submitit.SlurmExecutor(folder / "slurm", max_num_timeout=_REQUEUES)
        try:
            self._executor.update_parameters(**options)
        except (ValueError, TypeError) as error:
            raise UserError(f"--slurm: {' '.join(str(error).split())}") from error
        if workers is not None:
            self._executor.update_parameters(array_parallelism=workers)

    def room(self) -> int:
        return sys.maxsize

    def submit(self, jobs: Sequence[Job]) -> list[Submitted]:
        try:
            return self._executor.submit_array(jobs)
        except FailedJobError as error:
            reason = str(error).strip().splitlines()[-1]
            raise UserError(f"--launcher slurm: sbatch refused: {reason}") from error

    def attach(self, job_id: str) -> Submitted | None:
        job: Submitted = submitit.SlurmJob(self._executor.folder, job_id)
        state = job.watcher.get_state(job_id, mode="force").split()
        return job if state and state[0] in _ALIVE else None

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
