"""Tables and a figure of RetNet beside a transformer, in training and decoding at several lengths,
from the rows of `scripts.benchmark --only retention`."""

from collections.abc import Callable, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from sat_jax.results.figures import COLOURS
from sat_jax.results.rows import Row, device_name, latest
from sat_jax.results.run_plots import new_figure, tidy
from sat_jax.results.tables import Table
from sat_jax.results.text import quantity

_VARIANTS = ("chunkwise retention", "parallel retention", "attention")
_Points = dict[tuple[int, int], dict[str, Row]]  # by rows and length, then by variant


def retention_tables(rows: Sequence[Row]) -> list[Table]:
    """Return the tables of training and of decoding of the last measurement."""
    tables = []
    if training := _last(rows, "training"):
        body = tuple(
            (
                f"{length:,}",
                str(count),
                *(_cell(some.get(name), _throughput, "{:,.0f}") for name in _VARIANTS),
                *(_bytes(some.get(name), "temporary_bytes") for name in _VARIANTS),
            )
            for (count, length), some in training.items()
        )
        memory = tuple(f"temporaries, {name}" for name in _VARIANTS)
        header = ("row length", "rows", *_VARIANTS, *memory)
        caption = f"Tokens/s of a training step, and its temporaries; {_setting(training)}"
        tables.append(Table("retention_training", "Training by row length", caption, header, body))
    if decoding := _last(rows, "decoding"):
        names = ("retention", "attention")
        body = tuple(
            (
                str(count),
                f"{length:,}",
                *(_cell(some.get(name), _milliseconds, "{:.2f} ms") for name in names),
                *(_cell(some.get(name), _throughput, "{:,.0f}") for name in names),
                *(_bytes(some.get(name), "state_bytes") for name in names),
            )
            for (count, length), some in decoding.items()
        )
        header = ("rows", "tokens so far", "a token, retention", "a token, attention",
                  "tokens/s, retention", "tokens/s, attention", "state", "KV cache")  # fmt: skip
        caption = f"Decoding, greedy; {_setting(decoding)}"
        tables.append(Table("retention_decoding", "Decoding by length", caption, header, body))
    return tables


def retention_figure(rows: Sequence[Row]) -> Figure | None:
    """Return a figure of the last measurement: tokens/s and temporaries of a training step, and the
    time of a decoded token, by length; None without rows."""
    training, decoding = _last(rows, "training"), _last(rows, "decoding")
    if not training or not decoding:
        return None
    figure = new_figure(height=4.0, width=13.0)
    speed, memory, latency = figure.subplots(1, 3)
    trained = [(name, name, training) for name in _VARIANTS]
    _draw(speed, trained, _throughput, "training: row length [tokens]", "tokens per second")
    _draw(memory, trained, _temporaries, "training: row length [tokens]", "temporaries [GiB]")
    batches = {
        count: {key: some for key, some in decoding.items() if key[0] == count}
        for count in dict.fromkeys(count for count, _ in decoding)
    }
    decoded = [
        (f"{name}, {count} row{'s' * (count > 1)}", name, points)
        for count, points in batches.items()
        for name in ("retention", "attention")
    ]
    _draw(latency, decoded, _milliseconds, "decoding: tokens so far", "time of a token [ms]")
    return figure


def _last(rows: Sequence[Row], work: str) -> _Points:
    """Return the rows of the last measurement."""
    fields = {"benchmark": "retention", "work": work}
    newest, points = latest(rows, **fields), _Points()
    for row in rows if newest else ():
        if newest and {**fields, "date": newest["date"]}.items() <= row.items():
            points.setdefault((row["rows"], row["row_length"]), {})[row["variant"]] = row
    return points


def _throughput(row: Row) -> float:
    tokens = row["rows"] * row.get("decoded", row["row_length"])
    return float(tokens / row["wall_seconds"])


def _milliseconds(row: Row) -> float:
    return float(1000 * row["wall_seconds"] / row["decoded"])


def _temporaries(row: Row) -> float:
    return float(row["temporary_bytes"] / 2**30)


def _cell(row: Row | None, measure: Callable[[Row], float], form: str) -> str:
    """Format a measure, or why there is none."""
    if row is None:
        return "-"
    return row["not_run"] if "not_run" in row else form.format(measure(row))


def _bytes(row: Row | None, field: str) -> str:
    return "-" if row is None else quantity(row[field], "B")


def _setting(points: _Points) -> str:
    row = next(iter(next(iter(points.values())).values()))
    return f"{row['model']}; {row['dtype']}; remat {row['remat']}; {device_name(row['device'])}"


def _draw(
    axes: Axes,
    lines: Sequence[tuple[str, str, _Points]],
    measure: Callable[[Row], float],
    x: str,
    y: str,
) -> None:
    """Draw a line for each label, variant and its points, both axes logarithmic. Programs that did
    not run have a point where their memory is drawn, since that is known."""
    lengths = sorted({length for _, _, points in lines for _, length in points})
    for number, (label, variant, points) in enumerate(lines):
        rows = [(length, some[variant]) for (_, length), some in points.items() if variant in some]
        rows = [p for p in rows if "not_run" not in p[1] or measure is _temporaries]
        axes.plot(
            [length for length, _ in rows], [measure(row) for _, row in rows], label=label,
            color=COLOURS[number % len(COLOURS)], marker="o", markersize=5, linewidth=1.5,
        )  # fmt: skip
    tidy(axes, title="", x=x, y=y)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(lengths, [f"{length / 1024:g}k" for length in lengths])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.legend(fontsize=9, framealpha=0.9, edgecolor="none")
