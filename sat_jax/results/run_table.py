"""The text that a run prints when it ends."""

import datetime
from collections.abc import Mapping, Sequence
from typing import Any

from sat_jax.results.speed import (
    ABOVE_BOUND,
    ABOVE_BOUND_NOTE,
    is_dense,
    measured_speed,
    speedup_text,
    stored_share,
    whole_run_speedup,
)
from sat_jax.results.text import fixed_width, percent, quantity
from sat_jax.results.variants import percent_from
from sat_jax.train.metrics import NONFINITE


def end_of_run(summary: Mapping[str, Any]) -> str:
    """Return quality, speed of each rung, cost, written paths and next commands of a run.

    Reads these keys of `summary.json`; a missing one is a `KeyError`:

    - `perplexity_before`, `perplexity_after`: held-out, dense, per token; None: infinite,
      or NaN if `NONFINITE` says so;
    - `rungs`: in order of the run, each with `omission_rate` (configured), `kept_heads`,
      `kept_channels` (shares of all query heads and all channels, 0 to 1), `tokens` and `steps`
      (trained on this rung), `tokens_per_second` (median over the timed steps; None if none),
      `steps_timed` (steps without compilation or refresh), `bound` (dense FLOPs ÷ FLOPs) and,
      unless switched off, the fields of `train.speed.Speedup`, None if not measured;
    - `spent_flops` (training and probes) and `dense_flops` (the same tokens, dense);
    - `seconds`: wall time by part, with `total`;
    - `figures`: paths of the pictures; `export`: path of the exported model, or None.

    Optional: `adapter` and `quantized`, paths of the exported adapters and packed model, or None;
    `perplexity_dense` of the dense baseline; `teacher_flops`, a part of both FLOPs;
    `next_commands`, shell commands.
    """
    exported = (summary["export"], summary.get("adapter"), summary.get("quantized"))
    written = [*summary["figures"], *(path for path in exported if path is not None)]
    parts = {
        "Held-out perplexity": _quality(summary),
        "Speed of each rung: kept shares, median tokens/s, speed-up over the dense rung by wall"
        " time and by CPU time, FLOP bound": _speed(summary["rungs"]),
        "Cost": _cost(summary),
        "Written": written,
        "Next": list(summary.get("next_commands", ())),
    }
    return "\n\n".join(
        "\n".join([title, *(f"  {line}" for line in lines)])
        for title, lines in parts.items()
        if lines
    )


def _quality(summary: Mapping[str, Any]) -> list[str]:
    lines = []
    for name in ("before", "after"):
        value = summary[f"perplexity_{name}"]
        is_nan = summary.get(NONFINITE, {}).get(f"perplexity_{name}") == "nan"
        absent = "NaN" if is_nan else "infinite"
        lines.append(f"{name:<9}  {absent if value is None else f'{value:.3f}':>7}")
    after, dense = summary["perplexity_after"], summary.get("perplexity_dense")
    if after is not None and dense is not None:
        difference = f"{percent_from(after, dense):+.1f} %"
        lines.append(
            f"dense run  {dense:>7.3f}  on the same tokens; this run differs by {difference}"
        )
    return lines


def _speed(rungs: Sequence[Mapping[str, Any]]) -> list[str]:
    rows = []
    in_blocks = any(stored_share(rung) < 1 for rung in rungs)

    def kept(rung: Mapping[str, Any]) -> list[str]:
        if in_blocks:
            return [percent(stored_share(rung))]
        return [percent(rung["kept_heads"]), percent(rung["kept_channels"])]

    for rung in rungs:
        speed, speedup, cpu = measured_speed(rung), rung.get("speedup"), rung.get("cpu_speedup")
        spread = None if is_dense(rung) else rung.get("speedup_spread")
        rows.append(
            [
                "dense" if is_dense(rung) else f"{rung['omission_rate']:.2f}",
                *kept(rung),
                str(rung["steps"]),
                f"{speed:,.0f}" if speed else "-",
                speedup_text(speedup, rung["bound"], spread) if speedup else "-",
                f"{cpu:.2f}×" if cpu else "-",
                f"{rung['bound']:.2f}×",
            ]
        )
    shares = ("blocks",) if in_blocks else ("heads", "channels")
    header = ("rate", *shares, "steps", "tokens/s", "speed-up", "CPU time", "bound")
    lines = fixed_width(header, rows).splitlines()
    if not any(map(is_dense, rungs)):
        lines.append("No rung is dense, so there is no speed-up.")
    run = whole_run_speedup(rungs)
    if run is not None:
        text = speedup_text(run.speedup, run.bound, run.spread)
        lines.append(f"All steps of the run: {text}, bound {run.bound:.2f}×.")
    if any(ABOVE_BOUND in line for line in lines):
        lines.append(ABOVE_BOUND_NOTE)
    return lines


def _cost(summary: Mapping[str, Any]) -> list[str]:
    spent, dense, seconds = summary["spent_flops"], summary["dense_flops"], summary["seconds"]
    parts = sorted((part for part in seconds if part != "total"), key=seconds.get, reverse=True)
    shares = [f"{p} {percent(seconds[p] / seconds['total'])}" for p in parts if seconds[p] > 0]
    flops, time = quantity(spent, "FLOP"), datetime.timedelta(seconds=round(seconds["total"]))
    share = f"{percent(spent / dense)} of {quantity(dense, 'FLOP')} for the same tokens, dense"
    if teacher := summary.get("teacher_flops"):
        share += f"; {quantity(teacher, 'FLOP')} of both are forward passes of the teacher"
    return [f"FLOPs  {flops}  {share}", f"time   {time}  {', '.join(shares)}"]
