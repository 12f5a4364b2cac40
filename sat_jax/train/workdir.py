"""The work directory of a run: its files, its lock, and comparison of settings.

config.json      the settings of the run; paths change if the same content has moved
model.json       the shape of the model
tokenizer/       the tokenizer
inputs.json      fingerprints of the inputs that settings name by path
metrics.jsonl    one object per logged step
tensorboard/     the same for TensorBoard
checkpoints/     see `sat_jax.train.checkpoint`
huggingface/     the exported model, where one was asked for
adapter/         the exported adapter, of a run that trains one
quantized/       the exported model with packed matrices, of a run that quantizes them
summary.json     written when the run has finished
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
    """The paths of a work directory. Nothing is written before `lock`."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path).expanduser().absolute()
        self.config = self.path / "config.json"
        self.model = self.path / "model.json"
        self.tokenizer = self.path / "tokenizer"
        self.generation = self.tokenizer / "generation_config.json"
        self.inputs = self.path / "inputs.json"
        self.metrics = self.path / "metrics.jsonl"
        self.tensorboard = self.path / "tensorboard"
        self.checkpoints = self.path / "checkpoints"
        self.export = self.path / "huggingface"
        self.adapter = self.path / "adapter"
        self.quantized = self.path / "quantized"
        self.summary = self.path / "summary.json"

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Create the directory if missing and lock it for this process (process 0 of a run).

        Raises `UserError` if another process has the lock, if the directory contains other files
        than those of a run, or if it cannot be created or written. The operating system releases
        the lock when the process ends.
        """
        self._create()
        try:
            # Closed on exec: child processes do not keep the lock.
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
                # Not removed: another process may have opened the same file.
                file.truncate(0)

    def compare(self, config: Mapping[str, Any], free: Collection[str] = ()) -> None:
        """Compare `config` (nested, JSON) with that of the run in the directory, if any.

        `free` has keys ("train.log_every") and groups ("export") that may change when a run is
        continued. Raises `UserError` with old and new values of all other keys that differ.
        """
        if not self.config.exists():
            return
        old = _flat(read_json(self.config))
        new = _flat(json.loads(json.dumps(config, allow_nan=False)))  # tuples become lists
        changes = [
            f"{key} was {_json(old[key])} and is {_json(new[key])}"
            for key in sorted(old.keys() & new.keys())
            if old[key] != new[key] and not _is_free(key, free)
        ]
        if missing := sorted(key for key in new.keys() ^ old.keys() if not _is_free(key, free)):
            raise UserError(
                f"{self.path} was started by a version of sat_jax with different settings"
                f" ({', '.join(missing)}); accepted: that version, or a new work directory"
            )
        if changes:
            raise UserError(
                f"{self.path} was started with different settings: {'; '.join(changes)}; "
                "accepted: the old values, or a new work directory"
            )

    def begin(self, config: Mapping[str, Any]) -> None:
        """Write `config` if the run is new; else its paths of inputs, which may have moved.

        Called after all checks, so that refused settings are not written.
        """
        if not self.config.exists():
            write_json(self.config, config)
            return
        stored = read_json(self.config)
        model = stored["model"] | {name: config["model"][name] for name in ("path", "adapter")}
        inputs = {"model": model, "data": config["data"], "distill": config["distill"]}
        moved = {**stored, **inputs}
        if moved != stored:
            write_json(self.config, moved)

    def finished(self) -> dict[str, Any] | None:
        """Return the summary of a finished run, or None."""
        return read_json(self.summary) if self.summary.exists() else None

    def _create(self) -> None:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            names = {path.name for path in self.path.iterdir()}
        except OSError as error:
            raise UserError(f"work directory {self.path}: {folder_error(error)}") from error
        # A run writes the lock first; a copy of a work directory may not contain it.
        if names and _LOCK not in names and not {self.config.name, self.metrics.name} <= names:
            raise UserError(f"{self.path} is not a work directory: it contains other files")


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return values by dotted key; an empty group is a value."""
    result: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            result |= _flat(value, f"{prefix}{key}.")
        else:
            result[f"{prefix}{key}"] = value
    return result


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _is_free(key: str, free: Collection[str]) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in free)
