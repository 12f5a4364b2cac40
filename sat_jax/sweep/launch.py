"""Where the runs of a sweep run, through submitit: on this machine, a few at a time, or on Slurm as
an array of jobs. Every job is `Job`: the ordinary run, in a process of its own."""

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
from typing import Any, Protocol, TypeAlias

import jax
import submitit
from submitit.core.utils import FailedJobError

from sat_jax.config import Config
from sat_jax.errors import UserError
from sat_jax.train.loop import train

Submitted: TypeAlias = submitit.Job[str | None]

_RULE = "\n----------------------\n"
_NEVER = 60 * 24 * 365  # minutes
_REQUEUES = 20  # of one job that reaches its time limit; it has saved each time
_ALIVE = ("PENDING", "RUNNING", "REQUEUED", "COMPLETING", "CONFIGURING", "SUSPENDED")


@dataclasses.dataclass(frozen=True)
class Job:
    """A run as submitit calls it, and calls it anew after a requeue: the run continues.

    `environment` has variables of its process, None for one that it must not have; with `platform`
    it has to find devices of that kind.
    """

    config: Config
    directory: Path
    log: Path
    environment: Mapping[str, str | None] = dataclasses.field(default_factory=dict)
    platform: str | None = None

    def __call__(self) -> str | None:
        """Trains. Returns None, or the line that says why it failed, which ends the log. A run that
        was stopped ends the process."""
        _write_to(self.log)
        logging.getLogger("submitit").setLevel(logging.WARNING)
        for name, value in self.environment.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
        if self.platform is not None:
            jax.config.update("jax_platforms", self.platform)
        with _Stops() as stops:
            try:
                train(self.config, self.directory, _log)
            except KeyboardInterrupt:
                stops.requeue()
                sys.exit(130)
            except UserError as error:
                return _last_line(str(error))
            except Exception as error:
                traceback.print_exc()
                return _last_line(f"{type(error).__name__}: {error}")
        return None

    def checkpoint(self) -> submitit.helpers.DelayedSubmission:
        """What a requeued job does: the same."""
        return submitit.helpers.DelayedSubmission(self)


def failure(job: Submitted) -> str:
    """The line that says why an ended job is no finished run: the run's own, or what it ended with
    outside of the run, as where its process lacks a module or the disk is full."""
    try:
        return job.result() or "ended without a summary"
    except Exception as error:  # of any class that a job can end with
        _, ruled, rest = str(error).partition(_RULE)  # submitit's, around the job's trace
        lines = (rest.partition(_RULE)[0] if ruled else str(error)).strip().splitlines()
        return lines[-1] if lines else type(error).__name__


class _Stops:
    """Signals inside a job. SIGTERM does what a run makes of it (submitit would ignore it), and the
    signal ahead of a time limit too; submitit then has the job queued again."""

    def __enter__(self) -> "_Stops":
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        self._limit = signal.Signals[f"SIG{submitit.JobEnvironment.USR_SIG}"]
        self._submitit: Any = signal.signal(self._limit, self._near_the_limit)
        signal.signal(signal.SIGALRM, self._pass_on)
        self._asked = False
        return self

    def __exit__(self, *_: object) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(self._limit, self._submitit)

    def requeue(self) -> None:
        """Ends the process and queues the job again, if its time was up."""
        if self._asked:
            self._submitit(self._limit, None)

    def _near_the_limit(self, number: int, frame: FrameType | None) -> None:
        self._asked = True
        self._pass_on(number, frame)

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        """Stops the run once it listens: not before its first step, nor while it saves already,
        where SIGTERM would end it at once."""
        del number, frame
        if signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:
            signal.setitimer(signal.ITIMER_REAL, 0.1)
        else:
            os.kill(os.getpid(), signal.SIGTERM)


class Launcher(Protocol):
    """Where runs run."""

    outlives: bool  # whether jobs go on when the sweep's command ends
    seconds: float  # between two looks at the jobs

    def room(self) -> int:
        """How many more jobs may be handed over now."""

    def submit(self, jobs: Sequence[Job]) -> list[Submitted]:
        """Hands them over, at most `room()`."""

    def attach(self, job_id: str) -> Submitted | None:
        """A job that an earlier command handed over, if it waits or runs."""

    def stop(self) -> None:
        """Asks the jobs to save and end."""


class Local:
    """On this machine, `workers` at a time; each has an equal share of the GPUs `gpus`, by id."""

    outlives = False
    seconds = 0.5

    def __init__(self, folder: Path, workers: int = 1, gpus: Sequence[int] = ()):
        if len(gpus) % workers or len(set(gpus)) < len(gpus):
            raise UserError(
                f"--gpus {','.join(map(str, gpus))} are not shared evenly by --workers {workers}"
            )
        # A folder of its own for each command: submitit names files by process, and numbers recur.
        self._executor = submitit.LocalExecutor(folder / f"local-{time.time_ns()}")
        self._executor.update_parameters(timeout_min=_NEVER)
        self._slots: list[Submitted | None] = [None] * workers
        share = len(gpus) // workers
        parts = [gpus[slot * share : (slot + 1) * share] for slot in range(workers)]
        self._visible = [",".join(map(str, part)) for part in parts]

    def room(self) -> int:
        return sum(self._is_free(slot) for slot in range(len(self._slots)))

    def submit(self, jobs: Sequence[Job]) -> list[Submitted]:
        submitted = []
        for job in jobs:
            slot = next(slot for slot in range(len(self._slots)) if self._is_free(slot))
            # submitit hides all GPUs that it was not asked for.
            visible = self._visible[slot] or os.environ.get("CUDA_VISIBLE_DEVICES")
            placed = dataclasses.replace(
                job,
                environment={"CUDA_VISIBLE_DEVICES": visible},
                platform="cuda" if self._visible[slot] else None,
            )
            # Ctrl-C reaches every process of a terminal; submitit's would be killed by it without
            # having saved. They inherit that it is blocked, and are stopped by SIGTERM alone.
            before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
            try:
                self._slots[slot] = self._executor.submit(placed)
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)
            submitted.append(self._slots[slot])
        return submitted  # type: ignore[return-value]

    def attach(self, job_id: str) -> Submitted | None:
        del job_id
        return None

    def stop(self) -> None:
        for job in self._slots:
            if job is not None and not job.done():
                os.kill(int(job.job_id), signal.SIGTERM)  # submitit's watcher passes it on

    def _is_free(self, slot: int) -> bool:
        job = self._slots[slot]
        return job is None or job.done()


class Slurm:
    """As jobs of an array, at most `workers` at a time (None: as many as the cluster runs), with
    `options` of sbatch as `slurm_options` gives them."""

    outlives = True
    seconds = 5.0

    def __init__(self, folder: Path, options: Mapping[str, Any], workers: int | None = None):
        for program in ("sbatch", "srun"):
            if shutil.which(program) is None:
                raise UserError(f"--launcher slurm: no {program} on PATH; accepted: a cluster's")
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
            said = str(error).strip().splitlines()
            raise UserError(f"--launcher slurm: sbatch refused: {said[-1]}") from error

    def attach(self, job_id: str) -> Submitted | None:
        job: Submitted = submitit.SlurmJob(self._executor.folder, job_id)
        state = job.watcher.get_state(job_id, mode="force").split()
        return job if state and state[0] in _ALIVE else None

    def stop(self) -> None:
        pass


def slurm_options(texts: Sequence[str]) -> dict[str, Any]:
    """Options of sbatch by name, of texts `name=value,name=value`; whole numbers are numbers.

    Raises `UserError` for a text of another form, a name given twice, no time limit, and for more
    than one process a run.
    """
    options: dict[str, Any] = {}
    for part in (part for text in texts for part in re.split(r",(?=\w+=)", text)):
        name, separator, value = part.partition("=")
        if not separator or not value or name in options:
            raise UserError(f"--slurm {part}: accepted: NAME=VALUE, each name once")
        options[name] = int(value) if value.isdecimal() else value
    if not isinstance(options.get("time"), int):
        raise UserError("--slurm time=MINUTES is missing or no whole number")
    for name in ("nodes", "ntasks_per_node"):
        if options.get(name, 1) != 1:
            raise UserError(f"--slurm {name}={options[name]}: a run of a sweep is one process")
    if "setup" in options:
        options["setup"] = [str(options["setup"])]
    return options


def _write_to(log: Path) -> None:
    """What this process writes to its standard streams goes to the end of `log` from now on."""
    with log.open("a", encoding="utf-8") as file:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
            os.dup2(file.fileno(), stream.fileno())


def _last_line(message: str) -> str:
    line = " ".join(message.split())
    _log(f"error: {line}")
    return line


def _log(line: str) -> None:
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()
