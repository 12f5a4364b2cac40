"""Pictures of steps of large models: what `sizes` has as tables."""

import math
from collections.abc import Callable, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sat_jax.analysis.plots import BLUE, GREY, INK, ORANGE, new_figure, tidy
from sat_jax.report.sizes import MEMORY, Row, second_bound, setting_of, settings, trained

_COLUMNS = 2
_CELL = (6.0, 3.0)  # inches
_PARTS = dict(
    zip(MEMORY, (("state", BLUE), ("resting", GREY), ("temporaries", ORANGE)), strict=True)
)
_LINES = {"gather": BLUE, "kernel": ORANGE}


def memory_figure(rows: Sequence[Row]) -> Figure:
    """What lies in the device's memory in each step, a picture of each setting."""
    return _grid(rows, _memory)


def speed_figure(rows: Sequence[Row]) -> Figure:
    """Speed-ups over the dense step beside their bounds, a picture of each setting."""
    return _grid(rows, _speed)


def _grid(rows: Sequence[Row], draw: Callable[[Axes, list[Row]], None]) -> Figure:
    """A picture of each setting, side by side."""
    there = [together for together in settings(rows) if "error" not in together[0]]
    lines = math.ceil(len(there) / _COLUMNS)
    figure = new_figure(_CELL[1] * lines, _CELL[0] * min(_COLUMNS, len(there)))
    for place, together in enumerate(there, 1):
        axes = figure.add_subplot(lines, min(_COLUMNS, len(there)), place)
        draw(axes, [row for row in together if "error" not in row])
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    return figure


def _memory(axes: Axes, rows: list[Row]) -> None:
    """Bars of what lies in the device's memory, the dense step's total as a line."""
    names = [trained(row) for row in rows]
    start = [0.0] * len(rows)
    for part, (label, colour) in _PARTS.items():
        sizes = [row[part] / 2**30 for row in rows]
        axes.barh(names, sizes, left=start, color=colour, label=label, height=0.7)
        start = [a + b for a, b in zip(start, sizes, strict=True)]
    axes.axvline(start[0], color=INK, linewidth=1, linestyle=":")
    axes.invert_yaxis()
    tidy(axes, title=f"{setting_of(rows[0])}; {rows[0]['optimizer']}", x="GiB", y="")


def _speed(axes: Axes, rows: list[Row]) -> None:
    """Speed-up over the dense step against the omission rate, beside both bounds."""
    dense = rows[0]
    empty = next((row for row in rows if (row["part"], row["rate"]) == ("step", 1)), None)
    steps = [row for row in rows if row["part"] == "step" and 0 < row["rate"] < 1]
    steps.sort(key=lambda row: row["rate"])
    for execution, colour in _LINES.items():
        some = [row for row in steps if row["execution"] == execution]
        rates = [row["rate"] for row in some]
        found = [dense["seconds"] / row["seconds"] for row in some]
        axes.plot(rates, found, color=colour, marker="o", label=execution)
        axes.plot(rates, [row["bound"] for row in some], color=colour, linestyle=":")
        bounds = [second_bound(row, dense, empty) for row in some]
        second = [bound for bound in bounds if bound is not None]
        if len(second) == len(some):
            axes.plot(rates, second, color=colour, linestyle="--", linewidth=1)
    axes.plot([], [], color=INK, linestyle=":", label="FLOP bound")
    axes.plot([], [], color=INK, linestyle="--", linewidth=1, label="second bound")
    tidy(
        axes,
        title=f"{setting_of(dense)}; {dense['optimizer']}",
        x="omission rate",
        y="speed-up over dense",
    )
