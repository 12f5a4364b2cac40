"""Committed results: JSON lines under `experiments/results/`, each saying where it was measured."""

import datetime
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sat_jax.errors import UserError
from sat_jax.provenance import environment

Row = dict[str, Any]
# What rows of large models' steps are compared within.
STEP_SETTING = ("target", "model", "rows", "row_length", "dtype", "optimizer", "remat", "kernels")
ORIGIN = ("versions", "device", "commit")  # keys of `environment()`


def read(path: Path) -> list[Row]:
    """All rows of a file, oldest first.

    Raises `UserError` if the file is missing, and names the line that is no JSON object.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such results file")
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{path}:{number}: not a JSON object: {error}") from None
        if not isinstance(row, dict):
            raise UserError(f"{path}:{number}: not a JSON object: {line[:40]}")
        rows.append(row)
    return rows


def check(path: Path) -> None:
    """Raises `UserError` if rows cannot be appended to `path`."""
    if path.exists():
        read(path)
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise UserError(
            f"{path} cannot be written; accepted: a .jsonl file in a folder that exists"
        )


def append(
    path: Path, rows: Sequence[Mapping[str, Any]], where: Mapping[str, Any] | None = None
) -> None:
    """Adds rows, each with the date (UTC) and what `where` says under `ORIGIN`: commit, device and
    versions, by default those of this process.

    Raises `UserError` if the file cannot be written or holds something else than rows,
    `ValueError` for a row that names its origin itself or holds a value that is not finite.
    """
    check(path)
    origin = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        **(environment() if where is None else where),
    }
    for row in rows:
        if clash := sorted(row.keys() & origin.keys()):
            raise ValueError(f"a row must not set {', '.join(clash)}")
    lines = [json.dumps({**row, **origin}, allow_nan=False) + "\n" for row in rows]
    with path.open("a", encoding="utf-8") as file:
        file.write("".join(lines))


def latest(rows: Iterable[Row], **fields: Any) -> Row | None:
    """The last row in which every named field has the given value; None where there is none."""
    found = None
    for row in rows:
        if all(name in row and row[name] == value for name, value in fields.items()):
            found = row
    return found
