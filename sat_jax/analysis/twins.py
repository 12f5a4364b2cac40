"""Runs beside their dense twins. A run is its `summary.json` or its row: both have what is read."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from sat_jax.analysis.curves import training_seconds
from sat_jax.analysis.tables import whole_run_speedup

RunData: TypeAlias = Mapping[str, Any]

_SLACK = 1.01  # steps are whole: no length costs exactly what another run did

ESTIMATED, PAIRS = "≈", "§"
NOTES = {
    PAIRS: f"{PAIRS} Of fewer seeds: some have no dense run to compare with, or none around their"
    " FLOPs.",
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


def gap_at_equal_flops(run: RunData, dense: Sequence[RunData]) -> float | None:
    """Perplexity against what dense training reaches with the FLOPs that `run` spent, per cent.

    `dense` are dense runs of several lengths, each with its schedule to its end: between two of
    them log perplexity is taken as linear in log FLOPs. None where `run` spent more than the
    longest or less than the shortest (1 % of slack), or a perplexity is infinite.
    """
    spent, after = run["spent_flops"], run["perplexity_after"]
    reached = {one["spent_flops"]: one["perplexity_after"] for one in dense}
    if not reached or after is None or None in reached.values():
        return None
    costs = sorted(reached)
    if not costs[0] / _SLACK <= spent <= costs[-1] * _SLACK:
        return None
    there = np.interp(np.log(spent), np.log(costs), np.log([reached[cost] for cost in costs]))
    return float(100 * (after / np.exp(there) - 1))


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
