"""Losses of a run as committed rows store them: few points, against tokens."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

_POINTS = 16  # of a curve, at most


def curve_of(records: Sequence[Mapping[str, Any]]) -> dict[str, list[float | None]]:
    """Return at most 16 points of each loss, with five digits; None for a loss that is not finite.

    `tokens` are totals up to a point, `rate` is the omission rate there and `loss` the mean
    training loss (under masks) of the steps since the previous point; `eval_loss` is the held-out
    loss of the dense model, at `eval_tokens`. `records` are those of `metrics.jsonl`.
    """
    steps = [record for record in records if record.get("loss") is not None]
    if not steps:
        return {}
    blocks = np.array_split(np.arange(len(steps)), min(_POINTS, len(steps)))
    ends = [steps[block[-1]] for block in blocks]
    losses = np.array([record["loss"] for record in steps])
    held_out = [record for record in records if record.get("eval_loss") is not None]
    picked = np.unique(np.linspace(0, len(held_out) - 1, min(_POINTS, len(held_out))).round())
    held_out = [held_out[int(index)] for index in picked]
    eval_tokens = np.interp(
        [record["step"] for record in held_out],
        [0, *(record["step"] for record in steps)],
        [0, *(record["tokens"] for record in steps)],
    )
    curve = {
        "tokens": [record["tokens"] for record in ends],
        "rate": [record["omission_rate"] for record in ends],
        "loss": [losses[block].mean() for block in blocks],
        "eval_tokens": eval_tokens,
        "eval_loss": [record["eval_loss"] for record in held_out],
    }
    return {
        name: [float(f"{value:.5g}") if math.isfinite(value) else None for value in values]
        for name, values in curve.items()
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
