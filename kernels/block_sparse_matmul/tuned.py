"""What was measured on a device: which tiles are fastest, and whether XLA is faster still.

`tuning/<device>.json`, written by `python -m kernels.tune`, lists an entry for each `Case`. Where
there is no file, the default tiles hold, and kernels run where they are named.
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
    serves the numbers that are nearer to its own, as ratios, than to another's. Widths change the
    length of the sums more than which tiles suit, and are not told apart.
    """

    backend: str
    pattern: Kind
    operation: str
    dtype: str
    block: int
    tokens: int


class Entry(NamedTuple):
    """Medians of a call in seconds, None: it does not run here. `tiles` None: none do."""

    case: Case
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
        cases = [Case(*(row[name] for name in Case._fields)) for row in rows]
        complete = [pair for pair in zip(cases, rows, strict=True) if "tiles" in pair[1]]
        return rows, tuple(_entry(case, row) for case, row in complete)
    except (ValueError, TypeError, KeyError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"{file}: {reason}; `python -m kernels.tune` writes such files") from None


def best(device: str, case: Case, folder: Path = FOLDER) -> Tiles:
    """The tiles that are fastest for the nearest number of tokens, or the default."""
    known = {
        abs(math.log(entry.case.tokens / case.tokens)): entry.tiles
        for entry in entries(device, folder)
        if entry.case._replace(tokens=case.tokens) == case
    }
    return (known[min(known)] if known else None) or DEFAULTS[case.backend]


def verdict(
    device: str, backend: str, kind: Kind, dtype: str, block: int, folder: Path = FOLDER
) -> str | None:
    """Why XLA is to be preferred for patterns of a kind; None: the kernels of this dtype and block
    take no longer, by the geometric mean over operations and tokens."""
    timed = [
        entry
        for entry in entries(device, folder)
        if entry.case[:2] == (backend, kind) and entry.case[3:5] == (dtype, block)
    ]
    wanted = {operation for pattern, operation in OPERATIONS if pattern == kind}
    if wanted - {entry.case.operation for entry in timed}:
        how_far = "timed in part" if timed else "not timed"
        return f"{dtype} in blocks of {block} is {how_far} on {device}; `make tune` does that"
    logs = []
    for case, _, seconds, _, xla_seconds in timed:
        if seconds is None and xla_seconds is not None:
            return f"{case.operation} of {case.tokens} tokens does not run on {device}"
        if seconds is not None and xla_seconds is not None:
            logs.append(math.log(seconds / xla_seconds))
    ratio = math.exp(sum(logs) / len(logs)) if logs else 1.0
    return f"slower than XLA on {device} ({ratio:.2f}x the time)" if ratio > 1 else None


def _entry(case: Case, row: dict[str, Any]) -> Entry:
    given = row["tiles"]
    tiles = given and type(DEFAULTS[case.backend])(**given)
    return Entry(case, tiles, *(row[name] for name in Entry._fields[2:]))
