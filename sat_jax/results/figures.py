"""A figure of a group of runs: quality against cost."""

import base64
import io
from collections.abc import Sequence
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from sat_jax.results.means import Mean, mean_of
from sat_jax.results.run_plots import GREY, INK, new_figure, tidy
from sat_jax.results.variants import Group, Variant

# Okabe and Ito's, which colour-blind readers can tell apart; dense runs are black.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8A7A00")
_FONT = 9
_LINE = 0.17  # inches between two names
_FAR = 10.0  # percent from dense, from which on the axis may be logarithmic


class _Point(NamedTuple):
    variant: Variant
    flops: Mean
    difference: Mean


def quality_figure(group: Group) -> Figure | None:
    """Return a figure of perplexity relative to the dense baseline against FLOPs, with every
    variant named and dense runs of several lengths joined by a line.

    Below that line is better than dense training at equal FLOPs. None if no sparse variant has a
    dense baseline.
    """
    points = []
    for variant in group.variants:
        flops, difference = mean_of(variant.flops_shares()), mean_of(variant.differences())
        if variant.is_baseline:
            flops, difference = Mean(100.0, None), Mean(0.0, None)
        if flops and difference:
            points.append(_Point(variant, flops, difference))
    if all(point.variant.dense for point in points):
        return None
    figure = new_figure(max(4.5, 1.2 + _LINE * len(points)), 9.0)
    axes = figure.add_subplot()
    tidy(axes, title="", x="FLOPs, probes included [% of dense training]",
         y="perplexity from dense, same tokens [%]")  # fmt: skip
    dense = sorted((p.flops.value, p.difference.value) for p in points if p.variant.dense)
    axes.plot(*zip(*dense, strict=True), color=INK, linewidth=1, alpha=0.5, zorder=1)
    points.sort(key=lambda point: point.difference.value)
    for number, (variant, flops, difference) in enumerate(points):
        colour = "black" if variant.dense else _COLOURS[number % len(_COLOURS)]
        axes.errorbar(
            flops.value, difference.value, xerr=flops.error, yerr=difference.error, color=colour,
            fmt="s" if variant.dense else "o", markersize=5, elinewidth=1, capsize=2, zorder=3,
        )  # fmt: skip
        # Names to the right of the plot, in the order of their points, so that none overlap.
        axes.annotate(
            variant.name, (flops.value, difference.value), (1.02, (number + 0.5) / len(points)),
            textcoords="axes fraction", va="center", fontsize=_FONT, color=colour,
            arrowprops={"arrowstyle": "-", "color": GREY, "linewidth": 0.6, "relpos": (0, 0.5)},
            zorder=2,
        )  # fmt: skip
    _compress(axes, [point.difference.value for point in points])
    return figure


def _compress(axes: Axes, differences: Sequence[float]) -> None:
    """Make the axis logarithmic above `_FAR` if a point is beyond twice that, so that close points
    remain apart."""
    axes.margins(0.05)
    if max(differences) <= 2 * _FAR:
        return
    axes.set_yscale("symlog", linthresh=_FAR, linscale=2)
    axes.set_ylabel(f"{axes.get_ylabel()},\nlogarithmic above {_FAR:g}")
    ticks = (*np.arange(-_FAR, _FAR, 2), *(_FAR * np.array([1, 2, 5, 10, 20, 50, 100])))
    axes.set_yticks([tick for tick in ticks if min(differences) <= tick <= max(differences)])
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_locator(NullLocator())


def svg(figure: Figure) -> str:
    """Return the figure as a data URI; the same figure gives the same text."""
    file = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "sat_jax"}):
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    return f"data:image/svg+xml;base64,{base64.b64encode(file.getvalue()).decode()}"
