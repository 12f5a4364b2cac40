"""How far each run of a sweep is, read from the files that it writes."""

import collections
import dataclasses
import enum
import json
import statistics
from pathlib import Path
from typing import Any

from sat_jax.errors import UserError
from sat_jax.sweep.runs import Run
from sat_jax.train.workdir import WorkDir

_RECENT = 20  # records whose steps tell the time that is left


class State(enum.Enum):
    """Where a run stands, in the order in which a table has them."""

    RUNNING = "running"
    FAILED = "failed"
    STOPPED = "stopped"
    WAITING = "waiting"
    FINISHED = "finished"


@dataclasses.dataclass
class Watched:
    """A run and what is known of it; `error` is its one line where it failed."""

    run: Run
    workdir: WorkDir
    log: Path
    state: State = State.WAITING
    error: str = ""

    def __post_init__(self) -> None:
        self._metrics = _Follower(self.workdir.metrics)
        if self.workdir.summary.exists():
            self.state = State.FINISHED

    def check_data(self, fingerprint: str) -> None:
        """Raises `UserError` where the run has finished on other data than this."""
        summary = self.workdir.finished()
        if summary is not None and summary["data"] != fingerprint:
            raise UserError(
                f"run {self.run.name} in {self.workdir.path.parent} has finished on data that have"
                " changed since (their text, or how they are prepared); accepted: another"
                " --workdir, or the old data"
            )

    def look(self) -> bool:
        """Reads what is new; whether there was something."""
        return self._metrics.read()

    @property
    def step(self) -> int:
        """Steps done, as far as they are written."""
        return int(self._metrics.latest.get("step", 0))

    @property
    def steps(self) -> int:
        return self.run.config.train.steps

    @property
    def latest(self) -> dict[str, Any]:
        """The newest value of each thing that is logged."""
        return self._metrics.latest

    @property
    def seconds_left(self) -> float | None:
        """At the speed of the last steps, evaluations and checkpoints not counted."""
        recent = self._metrics.seconds
        return (self.steps - self.step) * statistics.mean(recent) if recent else None


class _Follower:
    """The lines that are added to a `metrics.jsonl`."""

    def __init__(self, path: Path):
        self._path = path
        self._begin()

    def _begin(self) -> None:
        self._read = 0
        self.latest: dict[str, Any] = {}
        self.seconds: collections.deque[float] = collections.deque(maxlen=_RECENT)

    def read(self) -> bool:
        """Takes whole new lines; a file that became shorter, of a resumed run, is read anew."""
        try:
            with self._path.open("rb") as file:
                if file.seek(0, 2) < self._read:
                    self._begin()
                file.seek(self._read)
                new = file.read()
        except FileNotFoundError:
            return False
        whole = new[: new.rfind(b"\n") + 1]
        self._read += len(whole)
        for line in whole.splitlines():
            record = json.loads(line)
            self.latest |= record
            if "seconds" in record:
                self.seconds.append(record["seconds"])
        return bool(whole)
