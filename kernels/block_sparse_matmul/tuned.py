"""Measured kernel times of a device: the fastest tiles, and whether XLA is faster.

`python -m kernels.tune` writes `tuning/<device>.json`, with an entry for each `Case` and `Matrix`.
Without a file, kernels use the default tiles and run only where they are named.
"""

import functools
import json
import math
import re
from pathlib import Path
from typing import Any, NamedTuple

import jax

from kernels.block_sparse_matmul.patterns import Kind
from kernels.block_sparse_matmul.tiles import DEFAULTS, Tiles

FOLDER = Path(__file__).parent / "tuning"
# Pattern and operation of every kernel of a training step; each has its own tiles.
OPERATIONS: tuple[tuple[Kind, str], ...] = (
    *(("rows", name) for name in ("column", "row", "row_pairs", "swiglu", "swiglu_gradients")),
    *(("mask", name) for name in ("column", "row", "sampled")),
)


class Case(NamedTuple):
    """The key by which tiles are chosen. `pattern`: `rows` or `mask`.

    The entry with the nearest number of tokens, as a ratio, applies, since the number of tokens
    determines how many tiles the processors share. The matrix size matters for `xla_advantage`
    only: it changes the length of the sums more than the best tiles.
    """

    backend: str
    pattern: Kind
    operation: str
    dtype: str
    block: int
    tokens: int


class Matrix(NamedTuple):
    """Size of a matrix `[neurons, width]` and its density, the kept fraction."""

    width: int
    neurons: int
    density: float


class Entry(NamedTuple):
    """Measured median seconds per call, None where it does not run. `tiles`: None if none run."""

    case: Case
    matrix: Matrix
    tiles: Tiles | None
    seconds: float | None
    xla_seconds: float | None


def path(device: str, folder: Path = FOLDER) -> Path:
    """Return the file of a device kind of jax: `nvidia-h200.json` for NVIDIA H200."""
    return folder / (re.sub("[^a-z0-9]+", "-", device.lower()).strip("-") + ".json")


def device_kind() -> str:
    """Return the device kind of the current mesh, or of the default device without a mesh."""
    kind = getattr(jax.sharding.get_abstract_mesh().abstract_device, "device_kind", None)
    return kind or jax.devices()[0].device_kind


@functools.cache
def entries(device: str, folder: Path = FOLDER) -> tuple[Entry, ...]:
    """Return the complete entries of a device kind. Reads the file once; raises as `read`."""
    return read(path(device, folder))[1]


def read(file: Path) -> tuple[list[dict[str, Any]], tuple[Entry, ...]]:
    """Return all rows of a file and its complete entries; empty if there is no file.

    Raises `ValueError` if the file is not a tuning file.
    """
    if not file.exists():
        return [], ()
    try:
        rows = json.loads(file.read_text(encoding="utf-8"))["entries"]
        return rows, tuple(entry for entry in map(_entry, rows) if entry is not None)
    except (ValueError, TypeError, KeyError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"{file}: {reason}; `python -m kernels.tune` writes such files") from None


def best_tiles(device: str, case: Case, folder: Path = FOLDER) -> Tiles:
    """Return the fastest tiles of the nearest measured number of tokens, or the default tiles."""
    nearest = min(
        _same_kernel(device, case, folder),
        key=lambda entry: _log_ratio(entry.case.tokens, case.tokens),
        default=None,
    )
    return (nearest and nearest.tiles) or DEFAULTS[case.backend]


def xla_advantage(device: str, case: Case, matrix: Matrix, folder: Path = FOLDER) -> str | None:
    """Return why XLA is preferred for an operation, or None if the kernel was not slower.

    The nearest entry decides, by the ratios of tokens, sizes and density.
    """

    def distance(entry: Entry) -> tuple[float, Case]:
        pairs = zip((entry.case.tokens, *entry.matrix), (case.tokens, *matrix), strict=True)
        return sum(_log_ratio(*pair) for pair in pairs), entry.case  # a tie: fewer tokens

    known = _same_kernel(device, case, folder)
    if not known:
        operation = f"{case.operation} of {case.dtype} in blocks of {case.block}"
        return f"{operation} is not timed on {device}; `make tune` does that"
    nearest = min(known, key=distance)
    (width, neurons, density), tokens = nearest.matrix, nearest.case.tokens
    setting = f"on {device} ({tokens} tokens, {density:.4g} of {neurons} x {width})"
    if nearest.seconds is None:
        return f"does not run {setting}"
    if nearest.xla_seconds is None or nearest.seconds <= nearest.xla_seconds:
        return None
    return f"{nearest.seconds / nearest.xla_seconds:.2f}x the time of XLA {setting}"


def _same_kernel(device: str, case: Case, folder: Path) -> list[Entry]:
    """Return the entries that differ from a case at most in the number of tokens."""
    known = entries(device, folder)
    return [entry for entry in known if entry.case._replace(tokens=case.tokens) == case]


def _log_ratio(a: float, b: float) -> float:
    return abs(math.log(a / b))


def _entry(row: dict[str, Any]) -> Entry | None:
    """Return the entry of a row, or None if its measurement is not complete."""
    case = Case(*(row[name] for name in Case._fields))
    matrix = Matrix(*(row[name] for name in Matrix._fields))
    if "tiles" not in row:
        return None
    tiles = row["tiles"] and type(DEFAULTS[case.backend])(**row["tiles"])
    return Entry(case, matrix, tiles, row["seconds"], row["xla_seconds"])
