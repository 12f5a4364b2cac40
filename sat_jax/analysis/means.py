"""Means over seeds with their standard errors."""

import statistics
from collections.abc import Sequence
from typing import NamedTuple


class Estimate(NamedTuple):
    """A mean and its standard error, which is None where it is of one value."""

    mean: float
    error: float | None


def estimate(values: Sequence[float | None]) -> Estimate | None:
    """Of all `values`; None where one is missing, or there are none."""
    known = [value for value in values if value is not None]
    if len(known) < len(values) or not known:
        return None
    error = statistics.stdev(known) / len(known) ** 0.5 if len(known) > 1 else None
    return Estimate(statistics.mean(known), error)


def mean_and_error(values: Sequence[float | None], text: str) -> str:
    """`1.234 ± 0.005`, each as `text` formats it; the error of a mean of one is not known, and a
    missing value makes the mean `-`."""
    found = estimate(values)
    if found is None:
        return "-"
    mean = text.format(found.mean)
    if found.error is None:
        return mean
    return f"{mean} ± {text.replace('+', '').format(found.error)}"
