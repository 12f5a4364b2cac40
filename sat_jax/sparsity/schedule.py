"""Schedules of the omission rate, in stairs of constant rate.

`ladder` is LORS of the SAT paper (arXiv:2406.01392); `cubic` is that of Zhu & Gupta
(arXiv:1710.01878) reversed, from sparse to dense; `s2d` is arXiv:2303.10464.
"""

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

Schedule = Literal["ladder", "auto", "constant", "linear", "cosine", "cubic", "s2d"]


class Stair(NamedTuple):
    """Steps `[start, stop)` with omission rate `scale` · r0."""

    start: int
    stop: int
    scale: float


_DECLINE: dict[str, Callable[[float], float]] = {
    "linear": lambda u: 1 - u,
    "cosine": lambda u: (1 + math.cos(math.pi * u)) / 2,
    "cubic": lambda u: (1 - u) ** 3,
}


def stairs(
    schedule: Schedule, steps: int, rungs: int, split: float, dense_start: float = 0.0
) -> tuple[Stair, ...]:
    """Return the nonempty stairs of a run. If steps do not divide evenly, later stairs are longer.

    The first `dense_start · steps` are dense. After them

    - `ladder`: r0 up to step `split · steps`, then `rungs` equal stairs, stair k at
      (1 - k / rungs) r0; the last stair is dense and has at least one step.
    - `auto`: the same; each start is the latest possible one.
    - `constant`: r0 in all steps.
    - `linear`, `cosine`, `cubic`: `rungs` equal stairs, stair k at the curve's value at
      k / (rungs - 1). The first is at r0, the last is dense (two rungs or more).
    - `s2d`: r0 up to step `split · steps`, then dense for at least one step.
    """
    begin = round(dense_start * steps)
    first = max(begin, min(round(split * steps), steps - 1))
    match schedule:
        case "constant":
            edges, scales = [begin, steps], [1.0]
        case "s2d":
            edges, scales = [begin, first, steps], [1.0, 0.0]
        case "ladder" | "auto":
            edges = [begin, *_edges(first, steps, rungs)]
            scales = [1 - k / rungs for k in range(rungs + 1)]
        case _:
            curve = _DECLINE[schedule]
            edges = _edges(begin, steps, rungs)
            scales = [curve(k / max(rungs - 1, 1)) for k in range(rungs)]
    rows = zip([0, *edges[:-1]], edges, [0.0, *scales], strict=True)
    return tuple(Stair(start, stop, scale) for start, stop, scale in rows if start < stop)


def _edges(start: int, stop: int, parts: int) -> list[int]:
    """Return the `parts + 1` edges of equal parts, rounded down: the last part is never empty."""
    return [start + (stop - start) * k // parts for k in range(parts + 1)]
