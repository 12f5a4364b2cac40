"""The metrics of a run, in `metrics.jsonl`, TensorBoard and the progress display."""

import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
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

# JSON has no NaN and infinity: they are written as null, and listed under this key of the record.
NONFINITE = "nonfinite"


class MetricsLog:
    """The log of a run on process 0. A record is written when the next one starts, so that logging
    does not wait for the device.

    The step of a record is the number of completed steps, as in checkpoints. A run that is restored
    at step n deletes the records after n; one that starts at 0 deletes all. Call `flush` before a
    checkpoint is saved, so that the records of its steps are on disk.
    """

    def __init__(self, workdir: WorkDir, start_step: int, progress: Progress | None = None) -> None:
        self._workdir, self._progress = workdir, progress
        # Step 0 may be logged: measurements before the first step.
        self._step = start_step or -1
        self._pending: dict[str, Value] | None = None
        _drop_after(workdir.metrics, self._step)
        self._file = open(workdir.metrics, "a", encoding="utf-8")  # noqa: SIM115, closed by `close`
        self._board = SummaryWriter(str(workdir.tensorboard), purge_step=start_step + 1)

    def log(self, step: int, values: Mapping[str, Value]) -> None:
        """Add `values` (scalars, or arrays and lists of them) to the record of `step`.

        Raises `ValueError` if the record is already written or contains one of the names.
        """
        if step < self._step or (step == self._step and self._pending is None):
            raise ValueError(f"step {step} is logged after step {self._step}")
        if step > self._step:
            self._write()
        pending = self._pending or {}
        if duplicates := values.keys() & {"step", NONFINITE, *pending}:
            raise ValueError(f"step {step} already has {', '.join(sorted(duplicates))}")
        for value in values.values():
            if isinstance(value, jax.Array):
                value.copy_to_host_async()
        self._step = step
        self._pending = {**pending, **values}

    def flush(self) -> None:
        """Write the pending record and wait until it is on disk. Raises `UserError` if it cannot be
        written."""
        with self._writing():
            self._write()
            os.fsync(self._file.fileno())
            self._board.flush()

    def close(self) -> None:
        """Write the pending record and close the files and the progress display."""
        with ExitStack() as stack:
            if self._progress is not None:
                stack.callback(self._progress.close)
            stack.enter_context(self._writing())
            stack.callback(self._board.close)
            stack.callback(self._file.close)
            self.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(f"{self._workdir.path}: cannot be written: {error.strerror}") from error

    def _write(self) -> None:
        if self._pending is None:
            return
        pending, self._pending = jax.device_get(self._pending), None
        values = {name: _plain(value) for name, value in pending.items()}
        # One write per line: only the last line can be incomplete after a kill.
        line = json.dumps(to_json({"step": self._step, **values}), allow_nan=False) + "\n"
        with self._writing():
            self._file.write(line)
            self._file.flush()
        for name, value in values.items():
            if isinstance(value, int | float):
                self._board.add_scalar(name, float(value), self._step)
        if self._progress is not None:
            self._progress.update(self._step, values)


def check_finite(workdir: WorkDir, done: int, loss: float, grad_norm: float | None = None) -> None:
    """Raise `UserError` if the held-out loss after `done` steps, or loss and gradient norm of the
    last of them, are not finite. Called before every save."""
    if np.isfinite([loss, grad_norm or 0.0]).all():
        return
    values = f"after step {done} the held-out loss is {loss}"
    if grad_norm is not None:
        values = f"step {done} has loss {loss} and gradient norm {grad_norm}"
    advice = "earlier checkpoints are kept; try a lower optimizer.learning_rate"
    if done == 0:
        advice = "the weights are damaged, or activations overflow"
    raise UserError(f"{workdir.path}: {values}; {advice}")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the records of a `metrics.jsonl`, without an incomplete last line.

    Raises `UserError` with the number of any other damaged line.
    """
    return [_from_json(record) for _, record in _records(path)]


def to_json(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy with None for non-finite numbers, listed as {"loss": "nan", "x[2]": "inf"}."""
    nonfinite: dict[str, str] = {}

    def finite(value: Any, name: str) -> Any:
        if isinstance(value, float) and not math.isfinite(value):
            nonfinite[name] = str(value)
            return None
        if isinstance(value, list | tuple):
            return [finite(item, f"{name}[{index}]") for index, item in enumerate(value)]
        return value

    values = {name: finite(value, name) for name, value in record.items()}
    return {**values, NONFINITE: nonfinite} if nonfinite else values


def _from_json(record: dict[str, Any]) -> dict[str, Any]:
    for path, text in record.pop(NONFINITE, {}).items():
        name, indices = re.fullmatch(r"(.*?)((?:\[\d+\])*)", path).groups()  # type: ignore[union-attr]
        parent: Any = record
        keys: list[Any] = [name, *map(int, re.findall(r"\d+", indices))]
        for key in keys[:-1]:
            parent = parent[key]
        parent[keys[-1]] = float(text)
    return record


def _plain(value: Any) -> Any:
    """Return Python numbers with exactly the same values."""
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else value


def _records(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """Return lines and their records."""
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
                break  # incomplete after a kill
            raise UserError(
                f"{path}, line {number}: not a record of a step: {line[:60]!r}"
            ) from error
        result.append((line.decode(), record))
    return result


def _drop_after(path: Path, step: int) -> None:
    """Delete the records after `step`; rewrite the file only if there are any."""
    if not path.exists():
        return
    kept = "".join(f"{line}\n" for line, record in _records(path) if record["step"] <= step)
    if kept.encode() != path.read_bytes():
        write_atomically(path, kept)
