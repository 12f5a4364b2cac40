"""Measured speed-ups of a run, and how they compare with the bound that its FLOPs set.

A rung is one of the mappings of `summary.json`'s `rungs`; see `sat_jax.results.run_table`.
"""

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

Rung: TypeAlias = Mapping[str, Any]

MINIMUM_STEPS = 3  # timed steps from which a median is a measurement
ABOVE_BOUND = "‡"
ABOVE_BOUND_NOTE = (
    f"{ABOVE_BOUND} above bound: noise, or work that FLOPs do not count (the optimizer's)"
)


def speedup_text(speedup: float, bound: float | None, error: float | None = None) -> str:
    """Format as `1.44× ± 0.05×`, with a mark if it exceeds `bound` by more than its error."""
    text = f"{speedup:.2f}×" + ("" if error is None else f" ± {error:.2f}×")
    exceeds = bound is not None and round(speedup - (error or 0.0), 2) > round(bound, 2)
    return text + ABOVE_BOUND * exceeds


def is_dense(rung: Rung) -> bool:
    """Whether a rung omits nothing, whatever rate was configured."""
    return bool(rung["kept_heads"] == rung["kept_channels"] == 1)


def measured_speed(rung: Rung) -> float | None:
    """Median tokens per second; None from fewer than three timed steps."""
    speed: float | None = rung["tokens_per_second"]
    return speed if rung["steps_timed"] >= MINIMUM_STEPS else None


def dense_speed(rungs: Sequence[Rung]) -> float | None:
    """Tokens per second of the dense rung; None if there is none or it is not measured."""
    speeds = [measured_speed(rung) for rung in rungs if is_dense(rung)]
    return next((speed for speed in speeds if speed is not None), None)


def whole_run_speedup(rungs: Sequence[Rung]) -> float | None:
    """Time of the same tokens at the dense rung's speed ÷ time of this run, from median speeds.

    None if a rung is not measured or none is dense.
    """
    dense, speeds = dense_speed(rungs), [measured_speed(rung) for rung in rungs]
    if dense is None or None in speeds:
        return None
    seconds = sum(rung["tokens"] / speed for rung, speed in zip(rungs, speeds, strict=True))
    return float(sum(rung["tokens"] for rung in rungs) / dense / seconds)
