"""What was measured on a device: which tiles are fastest, and whether XLA is faster still.

`tuning/<device>.json`, written by `python -m kernels.tune`, lists an entry for each `Case` and
`Matrix`. Where there is no file, the default tiles hold, and kernels run where they are named.
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
# Pattern and operation, whatever has tiles of its own in a step of training.
OPERATIONS: tuple[tuple[Kind, str], ...] = (
    *(("rows", name) for name in ("column", "row", "row_pairs", "swiglu", "swiglu_gradients")),
    *(("mask", name) for name in ("column", "row", "sampled")),
)


class Case(NamedTuple):
    """What tiles are chosen for. `pattern`: `rows` or `mask`.

    Tokens, since they decide how many tiles there are to share out among the processors; an entry
    serves the numbers that are nearer to its own, as ratios, than to another's. Matrices change the
    length of the sums more than which tiles suit, and are told apart by `verdict` alone.
    """

    backend: str
    pattern: Kind
    operation: str
    dtype: str
    block: int
    tokens: int


class Matrix(NamedTuple):
    """`[neurons, width]`, of which the share `density` takes part."""

    width: int
    neurons: int
    density: float


class Entry(NamedTuple):
    """Medians of a call in seconds, None: it does not run here. `tiles` None: none do."""

    case: Case
    matrix: Matrix
    tiles: Tiles | None
    seconds: float | None
    default_seconds: float | None
    xla_seconds: float | None


def path(device: str, folder: Path = FOLDER) -> Path:
    """The file of a kind of device, as jax calls it: of NVIDIA H200 `nvidia-h200.json`."""
    return folder / (re.sub("[^a-z0-9]+", "-", device.lower()).strip("-") + ".json")


def device_kind() -> str:
    """Of the mesh's device where one is set, else of the default one."""
    described = getattr(jax.sharding.get_abstract_mesh().abstract_device, "device_kind", None)
    return described or jax.devices()[0].device_kind


@functools.cache
def entries(device: str, folder: Path = FOLDER) -> tuple[Entry, ...]:
    """Of that kind of device, those that are measured to the end; read once. Raises as `read`."""
    return read(path(device, folder))[1]


def read(file: Path) -> tuple[list[dict[str, Any]], tuple[Entry, ...]]:
    """All that a file says, if there is one, and what is measured to the end. Raises `ValueError`
    where it is none of ours."""
    if not file.exists():
        return [], ()
    try:
        rows = json.loads(file.read_text(encoding="utf-8"))["entries"]
        return rows, tuple(entry for entry in map(_entry, rows) if entry is not None)
    except (ValueError, TypeError, KeyError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"{file}: {reason}; `python -m kernels.tune` writes such files") from None


def best(device: str, case: Case, folder: Path = FOLDER) -> Tiles:
    """The tiles that are fastest for the nearest number of tokens, or the default."""
    known = _of(device, case, folder)
    nearest = min(known, key=lambda entry: _apart(entry.case.tokens, case.tokens), default=None)
    return (nearest and nearest.tiles) or DEFAULTS[case.backend]


def verdict(device: str, case: Case, matrix: Matrix, folder: Path = FOLDER) -> str | None:
    """Why XLA is to be preferred for one operation; None: of what was timed, the kernel took no
    longer at the nearest number of tokens, sizes and density together."""

    def distance(entry: Entry) -> tuple[float, Case]:
        pairs = zip((entry.case.tokens, *entry.matrix), (case.tokens, *matrix), strict=True)
        return sum(_apart(*pair) for pair in pairs), entry.case  # of two as near, fewer tokens

    known = _of(device, case, folder)
    if not known:
        what = f"{case.operation} of {case.dtype} in blocks of {case.block}"
        return f"{what} is not timed on {device}; `make tune` does that"
    nearest = min(known, key=distance)
    (width, neurons, density), tokens = nearest.matrix, nearest.case.tokens
    where = f"on {device} ({tokens} tokens, {density:.4g} of {neurons} x {width})"
    if nearest.seconds is None:
        return f"does not run {where}"
    if nearest.xla_seconds is None or nearest.seconds <= nearest.xla_seconds:
        return None
    return f"{nearest.seconds / nearest.xla_seconds:.2f}x the time of XLA {where}"


def _of(device: str, case: Case, folder: Path) -> list[Entry]:
    """Entries that differ from a case in tokens at most."""
    known = entries(device, folder)
    return [entry for entry in known if entry.case._replace(tokens=case.tokens) == case]


def _apart(one: float, other: float) -> float:
    """How far, as a ratio."""
    return abs(math.log(one / other))


def _entry(row: dict[str, Any]) -> Entry | None:
    """None: it is not measured to its end."""
    case = Case(*(row[name] for name in Case._fields))
    matrix = Matrix(*(row[name] for name in Matrix._fields))
    if "tiles" not in row:
        return None
    given = row["tiles"]
    tiles = given and type(DEFAULTS[case.backend])(**given)
    return Entry(case, matrix, tiles, *(row[name] for name in Entry._fields[3:]))
