"""Tables and a figure of benchmarks, which time or compile single steps."""

import math
from collections.abc import Callable, Iterator, Sequence

from matplotlib.figure import Figure

from sat_jax.errors import UserError
from sat_jax.results.rows import STEP_SETTING, Row, device_name, latest
from sat_jax.results.run_plots import BLUE, GREY, INK, ORANGE, new_figure, tidy
from sat_jax.results.speed import ABOVE_BOUND, ABOVE_BOUND_NOTE, speedup_text
from sat_jax.results.text import markdown, percent

_MEMORY = {
    "state": ("state_bytes", BLUE),
    "omitted state": ("resting_bytes", GREY),
    "temporaries": ("temporary_bytes", ORANGE),
}
_COLUMNS = 2  # of plots
_PLOT = (6.0, 3.0)  # inches


def steps_table(rows: Sequence[Row]) -> str:
    """Return the last measurement of `scripts.benchmark --only steps` beside the dense step."""
    dense = latest(rows, benchmark="steps", execution="dense")
    if dense is None:
        raise UserError("no dense step among the rows")
    body = []
    for row in rows:
        if row.get("benchmark") != "steps" or row["date"] != dense["date"]:
            continue
        name = _trained(row)
        if row.get("dense_tokens"):
            name += f", {percent(row['dense_tokens'])} of the tokens with all channels"
        # Mask execution computes everything, so that it has no bound.
        bound = None if row["execution"] == "mask" else row["bound"]
        speedup = [speedup_text(row["speedup_wall"], bound), f"{bound:.2f}×" if bound else "-"]
        body.append([name, *_kept(row), f"{row['wall_seconds']:.1f} s", *speedup])
    header = ("one step", "heads kept", "channels kept", "time", "speed-up", "FLOP bound")
    tokens = f"{dense['rows'] * dense['row_length']:,} tokens"
    caption = f"{dense['model']}; {tokens}; {dense['dtype']}; {device_name(dense['device'])}"
    return _with_caption(markdown(header, body), caption)


def memory_table(rows: Sequence[Row]) -> str:
    """Return what `scripts.memory` compiled, a table for each setting."""

    def line(row: Row, dense: Row) -> list[str]:
        total = _memory(row)
        refresh = f"{row['refresh_bytes'] / 2**30:.1f} GiB" if row.get("refresh_bytes") else "-"
        parts = [f"{count / 2**30:.1f} GiB" for count in (*map(row.get, _fields()), total)]
        return [*parts, f"{total / _memory(dense):.2f}×", refresh]

    return _by_setting(rows, (*_MEMORY, "total", "of dense", "at a refresh"), line)


def speed_table(rows: Sequence[Row]) -> str:
    """Return what `scripts.efficiency` measured, a table for each setting.

    MFU: FLOPs of the trained model, none counted twice, ÷ time and the device's own rate of matrix
    products.
    """
    peaks = {_setting(row): row for row in rows if row.get("part") == "peak"}

    def line(row: Row, dense: Row) -> list[str]:
        seconds, speedup = row["seconds"], dense["seconds"] / row["seconds"]
        peak = peaks.get(_setting(row))
        rate = row["model_flops"] / seconds
        return [
            f"{seconds * 1e3:,.1f} ms",
            f"{row['rows'] * row['row_length'] / seconds:,.0f}",
            percent(rate * peak["seconds"] / peak["model_flops"]) if peak else "-",
            speedup_text(speedup, row["bound"]),
            f"{row['bound']:.2f}×",
            f"{_memory(row) / 2**30:.1f} GiB",
            f"{row['compile_seconds']:.0f} s",
        ]

    header = ("time", "tokens/s", "MFU", "speed-up", "FLOP bound", "memory", "compilation")
    return _by_setting(rows, header, line)


TABLES: dict[str, Callable[[Sequence[Row]], str]] = {
    "steps": steps_table,
    "memory": memory_table,
    "speed": speed_table,
}


def memory_figure(rows: Sequence[Row]) -> Figure:
    """Return bars of the device memory of each step, a plot for each setting."""
    settings = [steps for steps in _settings(rows) if "error" not in steps[0]]
    lines, columns = math.ceil(len(settings) / _COLUMNS), min(_COLUMNS, len(settings))
    figure = new_figure(_PLOT[1] * lines, _PLOT[0] * columns)
    for number, steps in enumerate(settings, 1):
        axes = figure.add_subplot(lines, columns, number)
        steps = [row for row in steps if "error" not in row]
        left = [0.0] * len(steps)
        for label, (field, colour) in _MEMORY.items():
            sizes = [row[field] / 2**30 for row in steps]
            names = [_trained(row) for row in steps]
            axes.barh(names, sizes, left=left, color=colour, label=label, height=0.7)
            left = [a + b for a, b in zip(left, sizes, strict=True)]
        axes.axvline(left[0], color=INK, linewidth=1, linestyle=":")
        axes.invert_yaxis()
        tidy(axes, title=f"{_model_and_tokens(steps[0])}; {steps[0]['optimizer']}", x="GiB", y="")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    return figure


def _by_setting(
    rows: Sequence[Row], header: tuple[str, ...], line: Callable[[Row, Row], list[str]]
) -> str:
    """`line` returns the cells of a row beside the dense step of its setting."""
    parts = []
    for steps in _settings(rows):
        dense = steps[0]
        failed = "not compared: the dense step failed" if "error" in dense else ""
        body = []
        for row in steps:
            error = row.get("error", failed)
            cells = [error] if error else [*_kept(row), *line(row, dense)]
            body.append([_trained(row), *cells, *[""] * (2 + len(header) - len(cells))])
        kernels = f"kernels {dense['kernels']}; " if dense["kernels"] else ""
        table = markdown(("trained", "heads kept", "channels kept", *header), body)
        caption = (
            f"{_model_and_tokens(dense)}; {dense['dtype']}; {dense['optimizer']}; remat"
            f" {dense['remat']}; {kernels}{dense['target']}"
        )
        parts.append(_with_caption(table, caption))
    return "\n\n".join(parts)


def _settings(rows: Sequence[Row]) -> Iterator[list[Row]]:
    """Yield the newest steps of each setting, the dense one first."""
    newest = {
        (_setting(row), row["execution"], row["rate"]): row
        for row in rows
        if row["part"] == "step" and row["rate"] < 1
    }
    for setting in dict.fromkeys(key[0] for key in newest):
        steps = [row for key, row in newest.items() if key[0] == setting]
        steps.sort(key=lambda row: row["execution"] != "dense")
        if steps[0]["execution"] != "dense":
            raise UserError(f"no dense step among the rows of {steps[0]['model']}")
        yield steps


def _setting(row: Row) -> tuple[object, ...]:
    return tuple(row[name] for name in STEP_SETTING)


def _model_and_tokens(row: Row) -> str:
    tokens = f"{row['rows'] * row['row_length']:,} tokens"
    return f"{row['model']}; {tokens} in rows of {row['row_length']:,}"


def _trained(row: Row) -> str:
    return "dense" if row["execution"] == "dense" else f"r = {row['rate']:g}, {row['execution']}"


def _kept(row: Row) -> list[str]:
    return [percent(row["kept_heads"]), percent(row["kept_channels"])]


def _fields() -> list[str]:
    return [field for field, _ in _MEMORY.values()]


def _memory(row: Row) -> int:
    return sum(row[field] for field in _fields())


def _with_caption(table: str, caption: str) -> str:
    note = f" {ABOVE_BOUND_NOTE}." if ABOVE_BOUND in table else ""
    return f"{table}\n\n{caption}.{note}"
