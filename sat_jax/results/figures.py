"""A figure of a group of runs: quality against cost."""

import base64
import io
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from sat_jax.results.run_plots import GREY, INK, new_figure, tidy
from sat_jax.results.variants import Group, Mean, mean_of

# Okabe and Ito's, which colour-blind readers can tell apart; dense runs are black.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8A7A00")
_MARKERS = "osD^"
_LINE = 0.17  # inches between two names
_FAR = 10  # percent from dense, from which on the axis may be logarithmic
_TICKS = (-10, -5, 0, 2, 4, 6, 8, 10, 20, 50, 100, 200, 500, 1000)


def look(number: int) -> dict[str, Any]:
    """Return the colour and the marker of the series with this number, for more series than there
    are colours."""
    marker, colour = divmod(number, len(COLOURS))
    return {"color": COLOURS[colour], "marker": _MARKERS[marker]}


def quality_figure(group: Group) -> Figure | None:
    """Return a figure of perplexity relative to the dense baseline against FLOPs, with every
    variant named and dense runs of several lengths joined by a line.

    Below that line is better than dense training at equal FLOPs. None if no sparse variant has a
    dense baseline.
    """
    points = []
    for variant in group.variants:
        flops = mean_of([run.flops_share() for run in variant.runs])
        difference = mean_of([run.difference() for run in variant.runs])
        if variant.is_baseline:
            flops, difference = Mean(100.0), Mean(0.0)
        if flops and difference:
            points.append((variant, flops, difference))
    if all(variant.dense for variant, *_ in points):
        return None
    figure = new_figure(max(4.5, 1.2 + _LINE * len(points)), 9.0)
    axes = figure.add_subplot()
    tidy(axes, title="", x="FLOPs, probes included [% of dense training]",
         y="perplexity from dense, same tokens [%]")  # fmt: skip
    dense = sorted((x.value, y.value) for variant, x, y in points if variant.dense)
    axes.plot(*zip(*dense, strict=True), color=INK, linewidth=1, alpha=0.5, zorder=1)
    points.sort(key=lambda point: point[2].value)
    for number, (variant, flops, difference) in enumerate(points):
        colour = "black" if variant.dense else COLOURS[number % len(COLOURS)]
        axes.errorbar(
            flops.value, difference.value, xerr=flops.error, yerr=difference.error, color=colour,
            fmt="s" if variant.dense else "o", markersize=5, elinewidth=1, capsize=2, zorder=3,
        )  # fmt: skip
        # Names to the right of the plot, in the order of their points, so that none overlap.
        axes.annotate(
            variant.name, (flops.value, difference.value), (1.02, (number + 0.5) / len(points)),
            textcoords="axes fraction", va="center", fontsize=9, color=colour,
            arrowprops={"arrowstyle": "-", "color": GREY, "linewidth": 0.6, "relpos": (0, 0.5)},
            zorder=2,
        )  # fmt: skip
    lowest, highest = points[0][2].value, points[-1][2].value
    if highest > 2 * _FAR:  # logarithmic far away, so that close points remain apart
        axes.set_yscale("symlog", linthresh=_FAR, linscale=2)
        axes.set_ylabel(f"{axes.get_ylabel()},\nlogarithmic above {_FAR}")
        axes.set_yticks([tick for tick in _TICKS if lowest <= tick <= highest])
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_locator(NullLocator())
    return figure


def svg(figure: Figure) -> str:
    """Return the figure as a data URI; the same figure gives the same text."""
    file = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "sat_jax"}):
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    return f"data:image/svg+xml;base64,{base64.b64encode(file.getvalue()).decode()}"
