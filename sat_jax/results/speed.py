"""Measured speed-ups of a run, and how they compare with the bound that its FLOPs set.

A rung is one of the mappings of `summary.json`'s `rungs`; see `sat_jax.results.run_table`.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

Rung: TypeAlias = Mapping[str, Any]

MINIMUM_STEPS = 3  # timed steps from which a median is a measurement
ABOVE_BOUND = "‡"
ABOVE_BOUND_NOTE = (
    f"{ABOVE_BOUND} above bound: noise, or work that FLOPs do not count (the optimizer's)"
)


def speedup_text(speedup: float, bound: float | None, error: float | None = None) -> str:
    """Format as `1.44× ± 0.05×`, with a mark if it exceeds `bound`, as both are shown, by more than
    its error."""
    text = f"{speedup:.2f}×" + ("" if error is None else f" ± {error:.2f}×")
    exceeds = bound is not None and round(speedup - (error or 0.0), 2) > round(bound, 2)
    return text + ABOVE_BOUND * exceeds


def is_dense(rung: Rung) -> bool:
    """Whether a rung omits nothing, whatever rate was configured."""
    keeps_all = rung["kept_heads"] == rung["kept_channels"] == stored_share(rung) == 1
    # Rows from before these existed have none.
    names = ("dropped_branches", "omitted_tokens", "skipped_tokens")
    omits = any(map(rung.get, names))
    return bool(keeps_all and not omits)


def stored_share(rung: Rung) -> float:
    """Share of the blocks of block-sparse matrices that are stored; 1 without these."""
    share: float = rung.get("stored_blocks", 1.0)  # rows from before there were any have none
    return share


def measured_speed(rung: Rung) -> float | None:
    """Median tokens per second; None from fewer than three timed steps."""
    speed: float | None = rung["tokens_per_second"]
    return speed if rung["steps_timed"] >= MINIMUM_STEPS else None


class WholeRun(NamedTuple):
    """Dense time ÷ time of the same steps, refreshes apart, its spread, and its FLOP bound."""

    speedup: float
    spread: float | None
    bound: float


def whole_run_speedup(rungs: Sequence[Rung]) -> WholeRun | None:
    """Return the speed-up of all steps of a run, from those that were measured of its rungs.

    The spread is to first order in the spreads of the rungs. None if a rung was not measured.
    """
    if any(rung.get("speedup") is None for rung in rungs):
        return None
    tokens = sum(rung["tokens"] for rung in rungs)
    times = [rung["tokens"] / rung["speedup"] for rung in rungs]
    speedup = tokens / sum(times)
    spreads = [
        time * rung["speedup_spread"] / rung["speedup"]
        for time, rung in zip(times, rungs, strict=True)
    ]
    bound = tokens / sum(rung["tokens"] / rung["bound"] for rung in rungs)
    return WholeRun(speedup, speedup**2 * sum(spreads) / tokens, bound)
