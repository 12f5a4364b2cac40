"""Committed results: JSON lines under `experiments/results/`, each with where it was measured."""

import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import jax

from sat_jax.errors import UserError

Row = dict[str, object]

_ROOT = Path(__file__).resolve().parents[2]
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy")


def commit() -> str | None:
    """Hash of the checkout that this package runs from, `-dirty` where tracked files differ.

    None where the package does not run from a git checkout of its own.
    """

    def git(*arguments: str) -> str:
        command = ("git", "-C", str(_ROOT), *arguments)
        return subprocess.run(command, capture_output=True, check=True, text=True).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != _ROOT:
            return None  # installed inside the checkout of another project
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + ("-dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def device() -> Row:
    """Kind and number of jax devices of all processes; for CPUs the model and usable cores."""
    first = jax.devices()[0]
    kind = first.device_kind
    if first.platform != "cpu":
        return {"kind": kind, "count": jax.device_count()}
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    affinity = getattr(os, "sched_getaffinity", None)  # not on every system
    cores = len(affinity(0)) if affinity else os.cpu_count()
    kind = models[0] if models else platform.machine()
    return {"kind": kind, "count": jax.device_count(), "cores": cores}


def provenance() -> Row:
    """Fields that make a number comparable later: date (UTC), commit, device, versions."""
    versions = {name: importlib.metadata.version(name) for name in _PACKAGES}
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "device": device(),
        "versions": {"python": platform.python_version(), **versions},
    }


def read(path: Path) -> list[Row]:
    """All rows of a file, oldest first.

    Raises:
      UserError: the file is missing or a line is not a whole JSON object; names file and line.
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


def append(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    """Adds rows, each with the fields of `provenance`; what the file holds is checked first.

    Raises:
      UserError: the file holds something else than rows.
      ValueError: a row has a field of `provenance`, or a value that is not finite.
    """
    if path.exists():
        read(path)
    origin = provenance()
    for row in rows:
        if clash := origin.keys() & row.keys():
            raise ValueError(f"a row must not set {sorted(clash)}")
    lines = [json.dumps({**row, **origin}, allow_nan=False) + "\n" for row in rows]
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write("".join(lines))


def latest(rows: Iterable[Row], **fields: object) -> Row | None:
    """The last row in which every named field has the given value; None where there is none."""
    absent = object()
    found = None
    for row in rows:
        if all(row.get(name, absent) == value for name, value in fields.items()):
            found = row
    return found
