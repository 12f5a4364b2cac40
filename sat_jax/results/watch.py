"""Progress of the runs of a sweep, read from the files that they write."""

import dataclasses
import enum
import statistics
from pathlib import Path
from typing import Any

from sat_jax.errors import UserError
from sat_jax.results.planned import PlannedRun
from sat_jax.train.metrics import read_metrics
from sat_jax.train.workdir import WorkDir

_RECENT = 20  # records from which the remaining time is estimated


class State(enum.Enum):
    """State of a run."""

    RUNNING = "running"
    FAILED = "failed"
    STOPPED = "stopped"
    WAITING = "waiting"
    FINISHED = "finished"


@dataclasses.dataclass
class WatchedRun:
    """A run and its progress; `error` is the reason, in one line, if it failed."""

    run: PlannedRun
    workdir: WorkDir
    log: Path
    state: State = State.WAITING
    error: str = ""

    def __post_init__(self) -> None:
        if self.workdir.summary.exists():
            self.state = State.FINISHED

    def check_finished(self, data: str) -> None:
        """Raise `UserError` if the run has finished on data of another fingerprint than `data`."""
        summary = self.workdir.finished()
        if summary is not None and summary["data"] != data:
            raise UserError(
                f"run {self.run.name} in {self.workdir.path.parent} has finished on data that have"
                " changed since (their text, or how they are prepared); accepted: another"
                " --workdir, or the old data"
            )

    def progress(self) -> dict[str, Any]:
        """Return the newest value of each metric, and `seconds_left` at the speed of the last
        steps, without evaluations and checkpoints."""
        records = read_metrics(self.workdir.metrics) if self.workdir.metrics.exists() else []
        newest: dict[str, Any] = {"step": 0}
        for record in records:
            newest |= record
        seconds = [record["seconds"] for record in records if "seconds" in record][-_RECENT:]
        if seconds:
            newest["seconds_left"] = (self.steps - newest["step"]) * statistics.mean(seconds)
        return newest

    @property
    def steps(self) -> int:
        return self.run.config.train.steps
