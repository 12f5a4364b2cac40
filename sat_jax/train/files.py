"""Atomic writes of text and JSON files."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sat_jax.errors import UserError


def write_atomically(path: Path, text: str) -> None:
    """Replace the content of `path` by `text`. A crash leaves the old file or the new one.

    Raises `UserError` if it cannot be written.
    """
    new = path.with_name(f"{path.name}.new")
    try:
        with open(new, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, path)
        sync_directory(path.parent)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}") from error


def sync_directory(path: Path) -> None:
    """Write the directory entries of `path` to disk, so that renames survive a power failure."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write an object atomically, indented. Raises `ValueError` for NaN and infinity."""
    write_atomically(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a file. Raises `UserError` if it cannot be read or is not an object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} contains a {type(value).__name__}; accepted: a JSON object")
    return value
