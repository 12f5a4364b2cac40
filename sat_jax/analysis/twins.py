"""Runs beside their dense twins. A run is its `summary.json` or its row: both have what is read."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

from sat_jax.analysis.curves import training_seconds
from sat_jax.analysis.tables import whole_run_speedup

RunData: TypeAlias = Mapping[str, Any]

ESTIMATED, PAIRS = "≈", "§"
NOTES = {
    PAIRS: f"{PAIRS} Of fewer pairs than seeds: some have no dense run.",
    ESTIMATED: f"{ESTIMATED} Estimated from the run's own dense rung: its dense twin was not timed"
    " on this device.",
}
"""What the marks of numbers beside a twin mean."""


class Speedups(NamedTuple):
    """Of each run; `estimated` where they do not come from the dense twins' time."""

    values: list[float | None]
    estimated: bool


def whole_runs(runs: Sequence[RunData], twins: Sequence[RunData | None]) -> Speedups:
    """Dense time ÷ time of each run, all of training in, compiling and evaluating apart.

    The dense time is the twin's on the same device; where one is missing it is estimated for all
    from each run's own dense rung, without refreshes.
    """
    measured = [
        None if twin is None else _time_ratio(run, twin)
        for run, twin in zip(runs, twins, strict=True)
    ]
    if None not in measured:
        return Speedups(measured, False)
    return Speedups([whole_run_speedup(run["rungs"]) for run in runs], True)


def gaps(runs: Sequence[RunData], twins: Sequence[RunData | None]) -> list[float | None]:
    """Perplexity against the dense twin's, per cent, of the runs that have one; None where one of
    the two is infinite."""
    return [_gap(run, twin) for run, twin in zip(runs, twins, strict=True) if twin is not None]


def device_name(device: Mapping[str, Any]) -> str:
    """In words: `2 × NVIDIA H200`, `AMD EPYC, 2 cores`."""
    many = f"{device['count']} × " if device["count"] > 1 else ""
    cores = f", {device['host_cpus']} cores" if device["platform"] == "cpu" else ""
    return f"{many}{device['kind']}{cores}"


def _time_ratio(run: RunData, twin: RunData) -> float | None:
    if device_name(run["device"]) != device_name(twin["device"]):
        return None
    return training_seconds(twin["seconds"]) / training_seconds(run["seconds"])


def _gap(run: RunData, twin: RunData) -> float | None:
    after, dense = run["perplexity_after"], twin["perplexity_after"]
    return None if after is None or dense is None else 100 * (after / dense - 1)
