"""Progress of the runs of a sweep, read from the files that they write."""

import collections
import dataclasses
import enum
import json
import statistics
from pathlib import Path
from typing import Any

from sat_jax.errors import UserError
from sat_jax.results.planned import PlannedRun
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
        self._metrics = _MetricsReader(self.workdir.metrics)
        if self.workdir.summary.exists():
            self.state = State.FINISHED

    def check_finished(self, data: str) -> None:
        """Raise `UserError` if the run has finished on other data, or with other kept neurons, than
        it would have now. `data` is the fingerprint of the data."""
        summary = self.workdir.finished()
        if summary is None:
            return
        place = f"run {self.run.name} in {self.workdir.path.parent} has finished"
        if summary["data"] != data:
            raise UserError(
                f"{place} on data that have changed since (their text, or how they are prepared);"
                " accepted: another --workdir, or the old data"
            )
        # Summaries of older versions do not have the counts.
        if summary.get("kept", self.run.plan.kept) != self.run.plan.kept:
            raise UserError(
                f"{place} with other counts of kept neurons than its settings give now; accepted:"
                " another --workdir"
            )

    def update(self) -> bool:
        """Read new records; return whether there were any."""
        return self._metrics.read()

    @property
    def step(self) -> int:
        """Finished steps, by the newest record."""
        return int(self._metrics.latest.get("step", 0))

    @property
    def steps(self) -> int:
        return self.run.config.train.steps

    @property
    def latest(self) -> dict[str, Any]:
        """The newest value of each metric."""
        return self._metrics.latest

    @property
    def seconds_left(self) -> float | None:
        """Remaining time at the speed of the last steps, without evaluations and checkpoints."""
        recent = self._metrics.seconds
        return (self.steps - self.step) * statistics.mean(recent) if recent else None


class _MetricsReader:
    """Reads the lines that are added to a `metrics.jsonl`."""

    def __init__(self, path: Path):
        self._path = path
        self._restart()

    def _restart(self) -> None:
        self._position = 0
        self.latest: dict[str, Any] = {}
        self.seconds: collections.deque[float] = collections.deque(maxlen=_RECENT)

    def read(self) -> bool:
        """Read complete new lines; a file that became shorter (a resumed run) from its start."""
        try:
            with self._path.open("rb") as file:
                if file.seek(0, 2) < self._position:
                    self._restart()
                file.seek(self._position)
                new = file.read()
        except FileNotFoundError:
            return False
        complete = new[: new.rfind(b"\n") + 1]
        self._position += len(complete)
        for line in complete.splitlines():
            record = json.loads(line)
            self.latest |= record
            if "seconds" in record:
                self.seconds.append(record["seconds"])
        return bool(complete)
