"""The table at the end of a sweep: a row a setting, over its seeds."""

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from sat_jax.analysis.means import mean_and_error
from sat_jax.analysis.tables import first_rung_speedup, fixed_width, sides
from sat_jax.analysis.twins import ESTIMATED, NOTES, PAIRS, Speedups, gaps, whole_runs
from sat_jax.sweep.axes import short_names, told
from sat_jax.sweep.runs import Run

Summary: TypeAlias = Mapping[str, Any]


def report(ended: Sequence[tuple[Run, Summary]]) -> str:
    """Of runs that have finished: held-out perplexity after, its distance from the dense run of the
    same seed where that is one of them, the speed-up of the first rung over a run's own dense one
    and that of the whole run over the dense run, else marked as estimated; each the mean over the
    seeds ± its standard error, where there are two or more."""
    # A twin's name says nothing of the data; its fingerprint does.
    dense = {(run.twin, summary["data"]): summary for run, summary in ended if run.dense}
    groups: dict[str, list[tuple[Run, Summary]]] = {}
    for run, summary in ended:
        groups.setdefault(run.group, []).append((run, summary))
    short = short_names(path for run, _ in ended for path in run.settings if path != "seed")
    rows = []
    for members in groups.values():
        settings = {k: v for k, v in members[0][0].settings.items() if k != "seed"}

        found = [summary for _, summary in members]
        twins = [
            None if run.dense else dense.get((run.twin, summary["data"]))
            for run, summary in members
        ]
        first = [first_rung_speedup(summary["rungs"]) for summary in found]
        rows.append(
            [
                told(settings, short) or "as given",
                str(len(members)),
                mean_and_error([summary["perplexity_after"] for summary in found], "{:.3f}"),
                _gap(gaps(found, twins), len(found)),
                mean_and_error(first, "{:.2f}x"),
                "-" if members[0][0].dense else _whole(whole_runs(found, twins)),
            ]
        )
    header = ("settings", "seeds", "perplexity", "from dense", "first rung", "whole run")
    table = fixed_width(header, rows, sides(1, 5))
    return "\n".join([table, *(note for mark, note in NOTES.items() if mark in table)])


def _gap(values: Sequence[float | None], seeds: int) -> str:
    text = mean_and_error(values, "{:+.1f} %")
    return f"{text}{PAIRS}" if 0 < len(values) < seeds else text


def _whole(speeds: Speedups) -> str:
    text = mean_and_error(speeds.values, "{:.2f}x")
    return f"{ESTIMATED} {text}" if speeds.estimated and text != "-" else text
