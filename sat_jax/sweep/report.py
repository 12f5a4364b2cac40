"""The table at the end of a sweep: a row a setting, over its seeds."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

from sat_jax.analysis.means import mean_and_error
from sat_jax.analysis.tables import (
    first_rung_speedup,
    fixed_width,
    is_dense,
    sides,
    whole_run_speedup,
)
from sat_jax.sweep.axes import short_names, told
from sat_jax.sweep.runs import Run

Summary: TypeAlias = Mapping[str, Any]


def report(ended: Sequence[tuple[Run, Summary]]) -> str:
    """Of runs that have finished: held-out perplexity after, its distance from the dense run of the
    same seed where that is one of them, and speed-ups over a run's own dense rung; each the mean
    over the seeds ± its standard error, where there are two or more."""
    dense = {run.twin: summary["perplexity_after"] for run, summary in ended if run.dense}
    groups: dict[str, list[tuple[Run, Summary]]] = {}
    for run, summary in ended:
        groups.setdefault(run.group, []).append((run, summary))
    short = short_names(path for run, _ in ended for path in run.settings if path != "seed")
    rows = []
    for members in groups.values():
        settings = {k: v for k, v in members[0][0].settings.items() if k != "seed"}

        def over(what: Callable[[Run, Summary], float | None], text: str) -> str:
            return mean_and_error([what(*one) for one in members], text)  # noqa: B023  # used here

        rows.append(
            [
                told(settings, short) or "as given",
                str(len(members)),
                over(lambda _, summary: summary["perplexity_after"], "{:.3f}"),
                over(lambda run, summary: _gap(summary, None if run.dense else dense.get(run.twin)),
                     "{:+.1f} %"),
                over(lambda _, summary: first_rung_speedup(summary["rungs"]), "{:.2f}x"),
                over(lambda _, summary: _whole(summary["rungs"]), "{:.2f}x"),
            ]
        )  # fmt: skip
    header = ("settings", "seeds", "perplexity", "from dense", "first rung", "whole run")
    return fixed_width(header, rows, sides(1, 5))


def _gap(summary: Summary, dense: float | None) -> float | None:
    """Per cent."""
    after = summary["perplexity_after"]
    return None if dense is None or after is None else 100 * (after / dense - 1)


def _whole(rungs: Sequence[Mapping[str, Any]]) -> float | None:
    return None if is_dense(rungs[0]) else whole_run_speedup(rungs)
