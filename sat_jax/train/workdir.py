"""The folder of one run: what is in it, who may write to it, and whether it is this run's.

config.json      the settings it was started with, written once
metrics.jsonl    one object a logged step, the truth
tensorboard/     the same for TensorBoard
checkpoints/     see `sat_jax.train.checkpoint`
huggingface/     the exported model, where one was asked for
summary.json     there once the run has finished
lock             who writes to it now
"""

import errno
import fcntl
import json
import os
import socket
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sat_jax.errors import UserError, folder_error
from sat_jax.train.files import read_json, write_json

_LOCK = "lock"


class WorkDir:
    """Names the files of a work directory. Nothing is touched before `lock`."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path).expanduser().absolute()
        self.config = self.path / "config.json"
        self.metrics = self.path / "metrics.jsonl"
        self.tensorboard = self.path / "tensorboard"
        self.checkpoints = self.path / "checkpoints"
        self.export = self.path / "huggingface"
        self.summary = self.path / "summary.json"

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Makes the folder if missing and holds it for this process; for process 0 of a run.

        Raises `UserError` if another process holds it (naming it), if the folder holds something
        else than a run, or if it cannot be made or written. The system lets go of the lock when a
        process dies.
        """
        self._make()
        try:
            # Kept open, and closed on exec: a program started from here does not keep the lock.
            descriptor = os.open(self.path / _LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise UserError(f"{self.path} cannot be written: {error.strerror}") from error
        with os.fdopen(descriptor, "r+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                    holder = file.read().strip() or "another process"
                    raise UserError(f"{self.path} is in use by {holder}") from error
                raise UserError(f"{self.path} cannot be locked: {error.strerror}") from error
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
            file.flush()
            try:
                yield
            finally:
                # Emptied, not removed: another process may be waiting on this very file.
                file.truncate(0)

    def compare(self, config: Mapping[str, Any], free: Collection[str] = ()) -> None:
        """Compares `config` (nested, JSON) with that of the run that is there, if one is.

        `free` names keys that may change between two starts of a run ("train.log_every"), or groups
        of them ("export"). Raises `UserError` naming every other key that differs, with the old
        and the new value.
        """
        if not self.config.exists():
            return
        old = _flat(read_json(self.config))
        new = _flat(json.loads(json.dumps(config, allow_nan=False)))  # tuples become lists
        changes = [
            f"{key} was {_told(old[key])} and is {_told(new[key])}"
            for key in sorted(old.keys() & new.keys())
            if old[key] != new[key] and not _is_free(key, free)
        ]
        if missing := sorted(key for key in new.keys() ^ old.keys() if not _is_free(key, free)):
            raise UserError(
                f"{self.path} was begun by a version of sat_jax with other settings"
                f" ({', '.join(missing)}); accepted: that version, or a new work directory"
            )
        if changes:
            raise UserError(
                f"{self.path} was started with other settings: {'; '.join(changes)}; "
                "give the old values or another work directory"
            )

    def begin(self, config: Mapping[str, Any]) -> None:
        """Writes `config` if the run is new. After everything that can refuse a run, so that a
        mistake does not stay in the folder."""
        if not self.config.exists():
            write_json(self.config, config)

    def finished(self) -> dict[str, Any] | None:
        """The summary of a run that has ended, None for one that has not."""
        return read_json(self.summary) if self.summary.exists() else None

    def _make(self) -> None:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            inside = {path.name for path in self.path.iterdir()}
        except OSError as error:
            raise UserError(f"work directory {self.path}: {folder_error(error)}") from error
        # The lock is the first file that a run makes; a copy may come without it.
        ours = not inside or _LOCK in inside or {self.config.name, self.metrics.name} <= inside
        if not ours:
            raise UserError(f"{self.path} is no work directory: it is not empty and holds no run")


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted keys to values; an empty group counts as a value."""
    result: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            result |= _flat(value, f"{prefix}{key}.")
        else:
            result[f"{prefix}{key}"] = value
    return result


def _told(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _is_free(key: str, free: Collection[str]) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in free)
