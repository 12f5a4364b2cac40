"""Omission rate over the steps of a run, as rungs: each rung is one static shape.

`ladder` is LORS of the SAT paper (arXiv:2406.01392); `cubic` is Zhu & Gupta (arXiv:1710.01878) run
backwards, from sparse to dense; `s2d` is one switch to dense (arXiv:2303.10464).
"""

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

Schedule = Literal["ladder", "constant", "linear", "cosine", "cubic", "s2d"]


class Stair(NamedTuple):
    """Steps `[start, stop)` that train at `scale` · r0."""

    start: int
    stop: int
    scale: float


_DECLINE: dict[str, Callable[[float], float]] = {
    "linear": lambda u: 1 - u,
    "cosine": lambda u: (1 + math.cos(math.pi * u)) / 2,
    "cubic": lambda u: (1 - u) ** 3,
}


def stairs(schedule: Schedule, steps: int, rungs: int, split: float) -> tuple[Stair, ...]:
    """The stairs of a run, without the empty ones. Where steps do not divide evenly, later stairs
    are the longer ones.

    - `ladder`: r0 for `split · steps`, then `rungs` equal stairs, stair k at (1 - k / rungs) r0:
      the last one is dense and has at least one step.
    - `constant`: r0 throughout.
    - `linear`, `cosine`, `cubic`: the whole run in `rungs` equal stairs, stair k at the curve's
      value at k / (rungs - 1), so that the first is at r0 and the last dense (two rungs or more).
    - `s2d`: r0 for `split · steps`, then dense, at least for one step.
    """
    first = min(round(split * steps), steps - 1)
    match schedule:
        case "constant":
            edges, scales = [0, steps], [1.0]
        case "s2d":
            edges, scales = [0, first, steps], [1.0, 0.0]
        case "ladder":
            rest = _edges(first, steps, rungs)
            edges, scales = [0, *rest], [1.0] + [1 - k / rungs for k in range(1, rungs + 1)]
        case _:
            curve = _DECLINE[schedule]
            edges = _edges(0, steps, rungs)
            scales = [curve(k / max(rungs - 1, 1)) for k in range(rungs)]
    rows = zip(edges, edges[1:], scales, strict=False)
    return tuple(Stair(start, stop, scale) for start, stop, scale in rows if start < stop)


def _edges(start: int, stop: int, parts: int) -> list[int]:
    """`parts + 1` borders of equal stretches, rounded down, so that the last is never empty."""
    return [start + (stop - start) * k // parts for k in range(parts + 1)]
