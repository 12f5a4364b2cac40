"""Figures of evaluations at several context lengths: perplexity and passkey retrieval."""

from collections.abc import Iterator, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator, PercentFormatter

from sat_jax.results.evaluations import newest_rows
from sat_jax.results.figures import COLOURS
from sat_jax.results.rows import Row
from sat_jax.results.run_plots import new_figure, tidy

_POSITION_CAPTION = (
    "Left: mean over tokens. Right: by position in windows of the longest context, mean over equal"
    " parts of the positions"
)


def context_figures(rows: Sequence[Row]) -> Iterator[tuple[str, Figure]]:
    """Yield a caption and a figure for each text and each setting of passkey retrieval.

    Perplexities that are not finite have no point.
    """
    for setting, lines in newest_rows(rows, ("context",)):
        figure = new_figure(width=10.0)
        left, right = figure.subplots(1, 2, sharey=True)
        _against_context(left, lines, "perplexity")
        tidy(left, title="", x="context [tokens]", y="perplexity per token")
        longest = max(row["context"] for _, row in lines)
        for colour, name, rows_of_model in _by_model(lines):
            row = rows_of_model[-1]
            if row["context"] < longest:
                continue
            parts = np.array(row["position_perplexity"], np.float64)  # None is NaN
            places = (np.arange(len(parts)) + 0.5) * longest / len(parts)
            right.plot(places, parts, color=colour, label=name, linewidth=1.5)
        tidy(right, title="", x=f"position in {longest:,} tokens", y="")
        _legend(left)
        yield f"{setting}. {_POSITION_CAPTION}.", figure
    for setting, lines in newest_rows(rows, ("passkey",)):
        figure = new_figure()
        axes = figure.add_subplot()
        _against_context(axes, lines, "accuracy")
        tidy(axes, title="", x="prompt and answer [tokens]", y="exact match")
        axes.set_ylim(-0.02, 1.02)
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0, symbol=" %"))
        _legend(axes)
        yield f"{setting}. Bars are standard errors over prompts.", figure


def _by_model(
    lines: Sequence[tuple[str, Row]],
) -> Iterator[tuple[str, str, list[Row]]]:
    """Yield a colour, a model and its rows in order of their contexts."""
    for number, name in enumerate(dict.fromkeys(name for name, _ in lines)):
        rows = [row for model, row in lines if model == name]
        rows.sort(key=lambda row: row["context"])
        yield COLOURS[number % len(COLOURS)], name, rows


def _against_context(axes: Axes, lines: Sequence[tuple[str, Row]], field: str) -> None:
    """Draw a field and its standard error, if it has one, against the logarithm of the context."""
    for colour, name, rows in _by_model(lines):
        contexts = [row["context"] for row in rows]
        values, errors = (
            np.array([row.get(key) for row in rows], np.float64) for key in (field, "stderr")
        )
        axes.errorbar(
            contexts, values, yerr=np.nan_to_num(errors), color=colour, label=name,
            marker="o", markersize=5, linewidth=1.5, elinewidth=1, capsize=2,
        )  # fmt: skip
    ticks = sorted({row["context"] for _, row in lines})
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.xaxis.set_minor_locator(NullLocator())


def _legend(axes: Axes) -> None:
    axes.legend(fontsize=9, framealpha=0.9, edgecolor="none")
