"""Means over seeds with their standard errors."""

import statistics
from collections.abc import Sequence
from typing import NamedTuple


class Mean(NamedTuple):
    """A mean and its standard error, which is None for a single value."""

    value: float
    error: float | None

    def text(self, form: str) -> str:
        """Format as `1.234 ± 0.005`, each number by the format `form`."""
        if self.error is None:
            return form.format(self.value)
        return f"{form.format(self.value)} ± {form.replace('+', '').format(self.error)}"


def mean_of(values: Sequence[float | None]) -> Mean | None:
    """Return the mean of `values`; None if any is None, or there are none."""
    known = [value for value in values if value is not None]
    if len(known) < len(values) or not known:
        return None
    error = statistics.stdev(known) / len(known) ** 0.5 if len(known) > 1 else None
    return Mean(statistics.mean(known), error)
