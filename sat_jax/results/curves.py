"""Losses of a run as committed rows store them: few points, against tokens, FLOPs and time."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

_POINTS = 16  # of a curve, at most
_TRAINING = ("data", "step", "refresh", "checkpoint")


def training_seconds(seconds: Mapping[str, float]) -> float:
    """Wall time of training, from the parts in `summary.json`: without set-up, compilation and
    evaluation."""
    return sum(seconds[part] for part in _TRAINING)


def curve_of(
    records: Sequence[Mapping[str, Any]], summary: Mapping[str, Any]
) -> dict[str, list[float | None]]:
    """Return at most 16 points of each loss, with five digits; None for a loss that is not finite.

    `tokens`, `flops` and `seconds` are totals up to a point, `rate` is the omission rate there and
    `loss` the mean training loss (under masks) of the steps since the previous point; `eval_loss`
    is the held-out loss of the dense model, at `eval_tokens`, `eval_flops`, `eval_seconds`.
    `records` are those of `metrics.jsonl`. FLOPs and seconds are distributed over the steps as
    these measured them and scaled to the totals in `summary`, which include probes, refreshes,
    data and checkpoints.
    """
    steps = [record for record in records if record.get("loss") is not None]
    if not steps:
        return {}
    number = np.array([0, *(record["step"] for record in steps)], float)
    tokens = np.array([0, *(record["tokens"] for record in steps)], float)
    # A record stands for the steps since the previous one.
    per_token = [0, *(record["flops_per_second"] / record["tokens_per_second"] for record in steps)]
    flops = _totals(np.diff(tokens, prepend=0) * per_token, summary["spent_flops"])
    per_step = [0, *(record["seconds"] for record in steps)]
    seconds = _totals(np.diff(number, prepend=0) * per_step, training_seconds(summary["seconds"]))
    blocks = np.array_split(np.arange(1, len(number)), min(_POINTS, len(steps)))
    ends = [block[-1] for block in blocks]
    held_out = [record for record in records if record.get("eval_loss") is not None]
    picked = np.unique(np.linspace(0, len(held_out) - 1, min(_POINTS, len(held_out))).round())
    held_out = [held_out[int(index)] for index in picked]
    eval_steps = [record["step"] for record in held_out]
    losses = np.array([record["loss"] for record in steps])
    return {
        "tokens": _rounded(tokens[ends]),
        "flops": _rounded(flops[ends]),
        "seconds": _rounded(seconds[ends]),
        "rate": _rounded([steps[end - 1]["omission_rate"] for end in ends]),
        "loss": _rounded([losses[block - 1].mean() for block in blocks]),
        "eval_tokens": _rounded(np.interp(eval_steps, number, tokens)),
        "eval_flops": _rounded(np.interp(eval_steps, number, flops)),
        "eval_seconds": _rounded(np.interp(eval_steps, number, seconds)),
        "eval_loss": _rounded([record["eval_loss"] for record in held_out]),
    }


def part_means(curve: Mapping[str, Sequence[float | None]], parts: int) -> list[float | None]:
    """Return the mean training loss of each of `parts` equal parts of a run's tokens.

    A point across the end of a part counts to both by its tokens. None from the first loss that is
    not finite; empty for a curve of fewer points than parts.
    """
    if len(curve.get("tokens", ())) < parts:
        return []
    tokens = np.array([0, *curve["tokens"]], float)
    losses = np.array(curve["loss"], float)
    totals = np.array([0, *np.cumsum(losses * np.diff(tokens))])
    ends = np.linspace(0, tokens[-1], parts + 1)
    means = np.diff(np.interp(ends, tokens, totals)) / np.diff(ends)
    return [float(mean) if math.isfinite(mean) else None for mean in means]


def _totals(parts: Float[np.ndarray, " N"], total: float) -> Float[np.ndarray, " N"]:
    sums = np.cumsum(parts)
    return sums * (total / sums[-1])


def _rounded(values: Any) -> list[float | None]:
    return [float(f"{value:.5g}") if math.isfinite(value) else None for value in values]
