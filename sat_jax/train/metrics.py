"""What a run measures: `metrics.jsonl` is the truth, TensorBoard and the progress bar show it."""

import json
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self, TypeAlias

import jax
import numpy as np
from tensorboardX import SummaryWriter

from sat_jax.errors import UserError
from sat_jax.train.files import write_atomically
from sat_jax.train.progress import Progress
from sat_jax.train.workdir import WorkDir

Value: TypeAlias = jax.Array | np.ndarray | np.generic | float | int | bool | str | list[Any] | None

# JSON has no such numbers: they are written as null, and this key of a record says where and which.
NONFINITE = "nonfinite"


class MetricsLog:
    """Writes one record a logged step, one step late, so that logging never waits for the device.

    A step's number is the count of steps done, as in checkpoints: a run restored at step n drops
    every record after n, one that starts at 0 drops all. A record is held until the next one comes,
    while the device works on; `flush` writes it at once, and has to be called before a checkpoint
    is saved, or a kill could leave a checkpoint whose last records were never written. For process
    0 of a run.
    """

    def __init__(self, workdir: WorkDir, start_step: int, progress: Progress | None = None) -> None:
        self._progress = progress
        # A run may log step 0: what it measured before its first step.
        self._step = start_step or -1
        self._pending: dict[str, Value] | None = None
        _drop_after(workdir.metrics, self._step)
        self._file = open(workdir.metrics, "a", encoding="utf-8")  # noqa: SIM115, closed by `close`
        self._board = SummaryWriter(str(workdir.tensorboard), purge_step=start_step + 1)

    def log(self, step: int, values: Mapping[str, Value]) -> None:
        """Adds `values` (scalars, or arrays and lists of them) to the record of `step`.

        Several calls for one step make one record. Raises `ValueError` if the step was already
        written or a name is taken.
        """
        if step < self._step or (step == self._step and self._pending is None):
            raise ValueError(f"step {step} is logged after step {self._step}")
        if step > self._step:
            self._write()
        pending = self._pending or {}
        if taken := values.keys() & {"step", NONFINITE, *pending}:
            raise ValueError(f"step {step} has {', '.join(sorted(taken))} already")
        for value in values.values():
            if isinstance(value, jax.Array):
                value.copy_to_host_async()
        self._step = step
        self._pending = {**pending, **values}

    def flush(self) -> None:
        """Writes the held record; returns when it is on disk."""
        self._write()
        os.fsync(self._file.fileno())
        self._board.flush()

    def close(self) -> None:
        """Writes the held record and closes the files, and the progress with them."""
        try:
            self.flush()
        finally:
            self._file.close()
            self._board.close()
            if self._progress is not None:
                self._progress.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _write(self) -> None:
        if self._pending is None:
            return
        pending, self._pending = jax.device_get(self._pending), None
        values = {name: _plain(value) for name, value in pending.items()}
        # One write of one line: a kill tears at most the last line.
        self._file.write(
            json.dumps(to_json({"step": self._step, **values}), allow_nan=False) + "\n"
        )
        self._file.flush()
        for name, value in values.items():
            if isinstance(value, int | float):
                self._board.add_scalar(name, float(value), self._step)
        if self._progress is not None:
            self._progress.update(self._step, values)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a `metrics.jsonl`, non-finite numbers restored; a torn last line is left out.

    Raises `UserError` naming the line if any other is damaged.
    """
    return [_from_json(record) for _, record in _records(path)]


def to_json(record: Mapping[str, Any]) -> dict[str, Any]:
    """A copy with None for non-finite numbers, which are listed: {"loss": "nan", "x[2]": "inf"}."""
    flags: dict[str, str] = {}

    def clean(value: Any, place: str) -> Any:
        if isinstance(value, float) and not math.isfinite(value):
            flags[place] = str(value)
            return None
        if isinstance(value, list | tuple):
            return [clean(item, f"{place}[{index}]") for index, item in enumerate(value)]
        return value

    cleaned = {name: clean(value, name) for name, value in record.items()}
    return {**cleaned, NONFINITE: flags} if flags else cleaned


def _from_json(record: dict[str, Any]) -> dict[str, Any]:
    for place, text in record.pop(NONFINITE, {}).items():
        name, indices = re.fullmatch(r"(.*?)((?:\[\d+\])*)", place).groups()  # type: ignore[union-attr]
        holder: Any = record
        keys: list[Any] = [name, *map(int, re.findall(r"\d+", indices))]
        for key in keys[:-1]:
            holder = holder[key]
        holder[keys[-1]] = float(text)
    return record


def _plain(value: Any) -> Any:
    """Python numbers. A float32 becomes the float of the same value, which prints exactly."""
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else value


def _records(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """Lines with their records."""
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    if not lines[-1]:
        lines.pop()
    result: list[tuple[str, dict[str, Any]]] = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            int(record["step"])
        except (ValueError, TypeError, KeyError) as error:
            if number == len(lines):
                break  # torn by a kill
            raise UserError(f"{path}, line {number}: no record of a step: {line[:60]!r}") from error
        result.append((line.decode(), record))
    return result


def _drop_after(path: Path, step: int) -> None:
    """Leaves the records up to `step`; rewrites the file only if that changes it."""
    if not path.exists():
        return
    kept = "".join(f"{line}\n" for line, record in _records(path) if record["step"] <= step)
    if kept.encode() != path.read_bytes():
        write_atomically(path, kept)
