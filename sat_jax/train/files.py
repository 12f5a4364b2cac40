"""Files that are either whole or absent."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sat_jax.errors import UserError


def write_atomically(path: Path, text: str) -> None:
    """Replaces `path` by `text`; a crash leaves the old file or the new one, never a part."""
    staged = path.with_name(f"{path.name}.new")
    with open(staged, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(staged, path)
    sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    """Makes the renames inside `path` outlast a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Writes an object atomically and readably; NaN and infinity are errors (`ValueError`)."""
    write_atomically(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """Reads an object; raises `UserError` naming the file if it cannot be read or is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} holds a {type(value).__name__}; a JSON object is expected")
    return value
