"""The summary of a run, and its wall time by phase."""

import resource
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import jax

from sat_jax.provenance import environment
from sat_jax.train.files import write_json
from sat_jax.train.metrics import to_json
from sat_jax.train.workdir import WorkDir

PARTS = ("setup", "compile", "data", "step", "refresh", "evaluate", "checkpoint", "speed")


class PhaseTimer:
    """Wall time of one thread by phase: `with timer("data"): ...`; everything else is "other".

    Phases may be nested; each second counts once, for the innermost.
    """

    def __init__(self) -> None:
        self._seconds = dict.fromkeys((*PARTS, "other"), 0.0)
        self._open = ["other"]
        self._since = time.perf_counter()

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        """Count the time of the block for `part`, one of `PARTS`."""
        if part not in PARTS:
            raise ValueError(f"part {part!r} of the wall time; accepted: {', '.join(PARTS)}")
        self._settle()
        self._open.append(part)
        try:
            yield
        finally:
            self._settle()
            self._open.pop()

    def add(self, seconds: Mapping[str, float]) -> None:
        """Add the `seconds()` of a checkpoint of the same run."""
        for part in self._seconds:
            self._seconds[part] += seconds.get(part, 0.0)  # a checkpoint may be older than a part

    def seconds(self) -> dict[str, float]:
        """Return the seconds by part until now, with "other" and "total"."""
        self._settle()
        return {**self._seconds, "total": sum(self._seconds.values())}

    def _settle(self) -> None:
        now = time.perf_counter()
        self._seconds[self._open[-1]] += now - self._since
        self._since = now


def write_summary(
    workdir: WorkDir,
    *,
    steps: int,
    tokens: int,
    losses: Mapping[str, float | None],
    dense_flops: float,
    spent_flops: float,
    seconds: Mapping[str, float],
    more: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Write `summary.json` atomically, which marks the run as finished, and return its content.

    `losses` are by name ("loss", "eval_loss"). `dense_flops` are those of the same tokens without
    sparsity, `seconds` those of `PhaseTimer.seconds()`, and `more` is added unchanged.
    """
    summary = {
        "steps": steps,
        "tokens": tokens,
        **losses,
        "dense_flops": dense_flops,
        "spent_flops": spent_flops,
        "seconds": dict(seconds),
        "peak_memory": peak_memory(),
        # Not measured: counters depend on the driver.
        "energy_joules": None,
        **environment(),
        **(more or {}),
    }
    written = to_json(summary)
    write_json(workdir.summary, written)
    return written


def peak_memory() -> dict[str, Any]:
    """Return the peak memory in bytes: the maximum over local devices, or that of the process if no
    device counts it."""
    counted = [
        stats["peak_bytes_in_use"]
        for device in jax.local_devices()
        if (stats := device.memory_stats()) and "peak_bytes_in_use" in stats
    ]
    if counted:
        return {"bytes": max(counted), "of": "device"}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"bytes": peak if sys.platform == "darwin" else peak * 1024, "of": "process"}
