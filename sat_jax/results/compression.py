"""The table and the figure of compressed models, from the rows of `scripts.compress --record`:
quality against size and against FLOPs."""

import collections
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sat_jax.results.figures import look
from sat_jax.results.rows import Row, device_name
from sat_jax.results.run_plots import new_figure, tidy
from sat_jax.results.tables import Table
from sat_jax.results.text import percent
from sat_jax.results.variants import percent_from, settings_in_words


def compression_tables(rows: Sequence[Row]) -> list[Table]:
    """Return a table for each model and its texts: a line for each method and its settings.

    Shares are those of the model before. `written` is the size of the files, `smallest` that
    without zeros or with factors in place of their product, and FLOPs are those of the latter.
    """
    tables = []
    for together in _comparable(rows):
        names, first = _names(together), together[0]
        body = tuple(
            (
                name,
                f"{row['perplexity']['after']:.3f}",
                f"{_loss(row):+.1f} %",
                percent(row["bytes"]["after"] / row["bytes"]["before"]),
                percent(_size(row)),
                percent(_flops(row)),
            )
            for name, row in zip(names, together, strict=True)
        )
        calibration, perplexity = first["calibration"], first["perplexity"]
        caption = (
            f"{first['model']}, perplexity {perplexity['before']:.3f} before, on"
            f" {perplexity['held_out_tokens']:,} held-out tokens of"
            f" {', '.join(calibration['sources'])} in rows of {perplexity['context']:,};"
            f" calibration on {calibration['rows']:,} such rows, {_bos(calibration)};"
            f" {device_name(first['device'])}"
        )
        header = ("method", "perplexity", "from before", "written", "smallest", "FLOPs")
        tables.append(Table("compression", "Compressed models", caption, header, body))
    return tables


def compression_figure(rows: Sequence[Row]) -> Figure | None:
    """Return a figure of the comparison with the most methods: perplexity against the smallest size
    and against FLOPs, with a line through those that no other beats in both; None without rows."""
    comparisons = _comparable(rows)
    if not comparisons:
        return None
    together = max(comparisons, key=len)
    figure = new_figure(width=11.0)
    panels = figure.subplots(1, 2, sharey=True)
    _draw(
        panels[0], together, _size, "bytes, share of the model before", "perplexity from before [%]"
    )
    _draw(panels[1], together, _flops, "FLOPs, share of the model before", "")
    panels[1].legend(fontsize=9, framealpha=0.9, edgecolor="none")
    return figure


def _draw(axes: Axes, rows: Sequence[Row], measure: Callable[[Row], float], x: str, y: str) -> None:
    methods = dict.fromkeys(row["method"]["method"] for row in rows)
    for number, method in enumerate(methods):
        some = [row for row in rows if row["method"]["method"] == method]
        points = [(100 * measure(row), _loss(row)) for row in some]
        axes.plot(
            *zip(*points, strict=True), markersize=6, linestyle="", label=method, **look(number)
        )
    front = pareto_front([(100 * measure(row), _loss(row)) for row in rows])
    axes.plot(*zip(*front, strict=True), color="black", linewidth=1.0, drawstyle="steps-post")
    tidy(axes, title="", x=f"{x} [%]", y=y)
    axes.set_yscale("symlog", linthresh=1.0)


def pareto_front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the points (cost, loss) that no other point beats in one without being worse in the
    other, by rising cost."""
    front: list[tuple[float, float]] = []
    for cost, loss in sorted(set(points)):
        if not front or loss < front[-1][1]:
            front.append((cost, loss))
    return front


def _comparable(rows: Sequence[Row]) -> list[list[Row]]:
    """Return the rows of each model and its texts; of equal methods the newest counts."""
    groups: dict[tuple[Any, ...], dict[str, Row]] = collections.defaultdict(dict)
    for row in rows:
        if row.get("measure") == "compression":
            calibration, perplexity = row["calibration"], row["perplexity"]
            same = (calibration["fingerprint"], calibration["rows"], perplexity["context"])
            groups[row["model"], *same][str(sorted(row["method"].items(), key=str))] = row
    return [list(group.values()) for group in groups.values()]


def _names(rows: Sequence[Row]) -> list[str]:
    """Return the methods, each with those of its settings that are not the same in all rows."""
    values = collections.defaultdict[str, set[str]](set)
    for row in rows:
        for key, value in row["method"].items():
            values[key].add(str(value))
    return [
        ", ".join([row["method"]["method"], *settings_in_words(_differing(row["method"], values))])
        for row in rows
    ]


def _differing(method: Mapping[str, Any], values: Mapping[str, set[str]]) -> dict[str, Any]:
    return {
        key: value
        for key, value in method.items()
        if key != "method" and value is not None and len(values[key]) > 1
    }


def _loss(row: Row) -> float:
    return percent_from(row["perplexity"]["after"], row["perplexity"]["before"])


def _size(row: Row) -> float:
    return _smallest(row["bytes"])


def _flops(row: Row) -> float:
    return _smallest(row["flops_per_token"])


def _smallest(costs: Mapping[str, float]) -> float:
    """Return the smallest share that a way of storing or multiplying the weights has."""
    return min(costs.values()) / costs["before"]


def _bos(calibration: Mapping[str, Any]) -> str:
    return "documents begin with bos" if calibration["adds_bos"] else "no bos"
