"""What is left of a run when it ends: `summary.json`, and where its wall time went."""

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


class Clock:
    """Splits wall time: `with clock("data"): ...`. Everything outside is "other".

    Parts may be nested; each second counts once, for the innermost. For one thread: what runs in
    the background costs no wall time.
    """

    def __init__(self) -> None:
        self._seconds = dict.fromkeys((*PARTS, "other"), 0.0)
        self._open = ["other"]
        self._since = time.perf_counter()

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        """Counts the time inside for `part`, one of `PARTS`."""
        if part not in PARTS:
            raise ValueError(f"part {part!r} of the wall time; known are {', '.join(PARTS)}")
        self._settle()
        self._open.append(part)
        try:
            yield
        finally:
            self._settle()
            self._open.pop()

    def add(self, seconds: Mapping[str, float]) -> None:
        """Adds the seconds of earlier starts of the same run (`seconds()`, from a checkpoint)."""
        for part in self._seconds:
            self._seconds[part] += seconds.get(part, 0.0)  # a checkpoint may be older than a part

    def seconds(self) -> dict[str, float]:
        """Seconds by part up to now, with "other" and "total"."""
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
    """Writes `summary.json` atomically, which marks the run as finished, and returns what it holds.

    `losses` by name ("loss", "eval_loss"); `dense_flops` is what the same tokens cost without
    sparsity, `spent_flops` what they did cost; `seconds` is `Clock.seconds()`; `more` is added as
    it is.
    """
    summary = {
        "steps": steps,
        "tokens": tokens,
        **losses,
        "dense_flops": dense_flops,
        "spent_flops": spent_flops,
        "seconds": dict(seconds),
        "peak_memory": peak_memory(),
        # No portable counter: the drivers' own would be one more dependency.
        "energy_joules": None,
        **environment(),
        **(more or {}),
    }
    written = to_json(summary)
    write_json(workdir.summary, written)
    return written


def peak_memory() -> dict[str, Any]:
    """Bytes at the highest, of the fullest local device; of this process if none counts them."""
    counted = [
        stats["peak_bytes_in_use"]
        for device in jax.local_devices()
        if (stats := device.memory_stats()) and "peak_bytes_in_use" in stats
    ]
    if counted:
        return {"bytes": max(counted), "of": "device"}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"bytes": peak if sys.platform == "darwin" else peak * 1024, "of": "process"}
