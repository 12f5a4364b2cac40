"""Committed results: JSON lines under `experiments/results/`, each with its origin."""

import datetime
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from sat_jax.errors import UserError
from sat_jax.provenance import environment

Row: TypeAlias = dict[str, Any]
# Fields within which measurements of large models' steps are compared.
STEP_SETTING = (
    *("target", "model", "rows", "row_length", "dtype", "optimizer", "remat", "kernels"),
    "attention",  # None: the default of the measurement, as in older rows, which lack it
)
ORIGIN = ("versions", "device", "commit")  # keys of `environment()`


def read(path: Path) -> list[Row]:
    """Return all rows of a file, oldest first.

    Raises `UserError` for a missing file, and for a line that is no JSON object, naming it.
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
    """Raise `UserError` if rows cannot be appended to `path`."""
    if path.exists():
        read(path)
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise UserError(
            f"{path} cannot be written; accepted: a .jsonl file in a folder that exists"
        )


def append(
    path: Path, rows: Sequence[Mapping[str, Any]], origin: Mapping[str, Any] | None = None
) -> None:
    """Append rows, each with the date (UTC) and `origin`: commit, device and versions, by default
    of this process.

    Raises `UserError` if the file cannot be written or holds anything but rows, and `ValueError`
    for a row that sets one of these fields itself or has a value that is not finite.
    """
    check(path)
    added = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        **(environment() if origin is None else origin),
    }
    for row in rows:
        if clash := sorted(row.keys() & added.keys()):
            raise ValueError(f"a row must not set {', '.join(clash)}")
    lines = [json.dumps({**row, **added}, allow_nan=False) + "\n" for row in rows]
    with path.open("a", encoding="utf-8") as file:
        file.write("".join(lines))


def latest(rows: Iterable[Row], /, **fields: Any) -> Row | None:
    """Return the last row in which every named field has the given value, or None."""
    matching = [row for row in rows if fields.items() <= row.items()]
    return matching[-1] if matching else None


def device_names(rows: Iterable[Row]) -> str:
    """Name the devices of rows, each once."""
    return " and ".join(dict.fromkeys(device_name(row["device"]) for row in rows))


def device_name(device: Mapping[str, Any]) -> str:
    """Name a row's device: `2 × NVIDIA H200`, `AMD EPYC, 2 cores`."""
    count = f"{device['count']} × " if device["count"] > 1 else ""
    cores = f", {device['host_cpus']} cores" if device["platform"] == "cpu" else ""
    return f"{count}{device['kind']}{cores}"
