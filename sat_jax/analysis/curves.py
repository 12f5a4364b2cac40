"""A run's losses in short form, as committed rows keep them: against tokens, FLOPs and time."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

POINTS = 16  # of a curve, at most: what a small picture can show
TRAINING = ("data", "step", "refresh", "checkpoint")


def training_seconds(seconds: Mapping[str, float]) -> float:
    """Wall time of the training itself: of `summary.json`'s parts all but setting up (tokenising
    too, which the first run does for all of them), compiling, evaluating and what is told as
    other."""
    return sum(seconds[part] for part in TRAINING)


def curve_of(
    records: Sequence[Mapping[str, Any]], summary: Mapping[str, Any]
) -> dict[str, list[float | None]]:
    """At most 16 points of each loss, five digits each; None where one is not finite.

    `tokens`, `flops` and `seconds` are sums up to the point, `rate` is the omission rate there and
    `loss` the mean training loss (under masks) of the steps since the point before; `eval_*` are
    the held-out losses of the dense model and where they stand. `records` are those of
    `metrics.jsonl`. FLOPs and seconds are spread over the steps as these measured them, so that
    they end at what `summary` says of the run, probes, refreshes, data and checkpoints in.
    """
    steps = [record for record in records if record.get("loss") is not None]
    if not steps:
        return {}
    number = np.array([0, *(record["step"] for record in steps)], float)
    tokens = np.array([0, *(record["tokens"] for record in steps)], float)
    # A record stands for the steps since the last one.
    a_token = [0, *(record["flops_per_second"] / record["tokens_per_second"] for record in steps)]
    flops = _sums(np.diff(tokens, prepend=0) * a_token, summary["spent_flops"])
    a_step = [0, *(record["seconds"] for record in steps)]
    seconds = _sums(np.diff(number, prepend=0) * a_step, training_seconds(summary["seconds"]))
    blocks = np.array_split(np.arange(1, len(number)), min(POINTS, len(steps)))
    ends = [block[-1] for block in blocks]
    held_out = [record for record in records if record.get("eval_loss") is not None]
    picked = np.unique(np.linspace(0, len(held_out) - 1, min(POINTS, len(held_out))).round())
    held_out = [held_out[int(index)] for index in picked]
    where = [record["step"] for record in held_out]
    losses = np.array([record["loss"] for record in steps])
    return {
        "tokens": _short(tokens[ends]),
        "flops": _short(flops[ends]),
        "seconds": _short(seconds[ends]),
        "rate": _short([steps[end - 1]["omission_rate"] for end in ends]),
        "loss": _short([losses[block - 1].mean() for block in blocks]),
        "eval_tokens": _short(np.interp(where, number, tokens)),
        "eval_flops": _short(np.interp(where, number, flops)),
        "eval_seconds": _short(np.interp(where, number, seconds)),
        "eval_loss": _short([record["eval_loss"] for record in held_out]),
    }


def part_means(curve: Mapping[str, Sequence[float | None]], parts: int) -> list[float | None]:
    """The mean training loss of each of `parts` equal parts of a run's tokens. A point that lies
    over the end of a part counts to both by its tokens. None from the first loss on that is not
    finite; empty for a curve of fewer points than parts."""
    if len(curve.get("tokens", ())) < parts:
        return []
    tokens = np.array([0, *curve["tokens"]], float)
    losses = np.array(curve["loss"], float)
    sums = np.array([0, *np.cumsum(losses * np.diff(tokens))])
    ends = np.linspace(0, tokens[-1], parts + 1)
    means = np.diff(np.interp(ends, tokens, sums)) / np.diff(ends)
    return [float(mean) if math.isfinite(mean) else None for mean in means]


def _sums(parts: Float[np.ndarray, " N"], total: float) -> Float[np.ndarray, " N"]:
    """Up to each part, scaled to end at `total`."""
    sums = np.cumsum(parts)
    return sums * (total / sums[-1])


def _short(values: Any) -> list[float | None]:
    return [float(f"{value:.5g}") if math.isfinite(value) else None for value in values]
