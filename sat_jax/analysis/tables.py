"""Tables as text: fixed width for a terminal, Markdown for a README, and the end of a run."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

Align = Literal["left", "right"]

MINIMUM_STEPS = 3  # a median of fewer is not a measurement


def _columns(
    header: Sequence[str], rows: Sequence[Sequence[str]], align: Sequence[Align]
) -> list[int]:
    """Width of each column; refuses rows that do not fit the header."""
    for cells in (*rows, align):
        if len(cells) != len(header):
            raise ValueError(f"{len(cells)} cells under {len(header)} headings: {list(cells)}")
    return [max(map(len, column)) for column in zip(header, *rows, strict=True)]


def _line(cells: Sequence[str], widths: Sequence[int], align: Sequence[Align], gap: str) -> str:
    padded = [
        cell.rjust(width) if side == "right" else cell.ljust(width)
        for cell, width, side in zip(cells, widths, align, strict=True)
    ]
    return gap.join(padded)


def sides(left: int, right: int) -> tuple[Align, ...]:
    """So many columns to the left, and so many after them to the right."""
    first: tuple[Align, ...] = ("left",)
    rest: tuple[Align, ...] = ("right",)
    return first * left + rest * right


def fixed_width(
    header: Sequence[str], rows: Sequence[Sequence[str]], align: Sequence[Align]
) -> str:
    """Columns two spaces apart, a rule under the header; no trailing spaces or newline.

    Raises:
      ValueError: a row or `align` has another length than `header`.
    """
    widths = _columns(header, rows, align)
    rule = ["-" * width for width in widths]
    return "\n".join(_line(cells, widths, align, "  ").rstrip() for cells in (header, rule, *rows))


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]], align: Sequence[Align]) -> str:
    """The same table in Markdown, padded so that the source reads as a table too.

    Raises:
      ValueError: a row or `align` has another length than `header`.
    """
    escaped = [[cell.replace("|", "\\|") for cell in cells] for cells in (header, *rows)]
    widths = [max(width, 3) for width in _columns(escaped[0], escaped[1:], align)]
    rule = [
        "-" * (width - 1) + (":" if side == "right" else "-")
        for width, side in zip(widths, align, strict=True)
    ]
    lines = [_line(cells, widths, align, " | ") for cells in (escaped[0], rule, *escaped[1:])]
    return "\n".join(f"| {line} |" for line in lines)


def quantity(value: float, unit: str) -> str:
    """Four significant digits with an SI prefix: `quantity(2.5e14, 'FLOP')` is `250.0 TFLOP`."""
    for prefix in ("", "k", "M", "G", "T", "P", "E"):
        if abs(value) < 999.95 or prefix == "E":
            break
        value /= 1000
    digits = 1 if prefix and abs(value) >= 100 else 2 if prefix else 0
    return f"{value:.{digits}f} {prefix}{unit}"


def percent(share: float) -> str:
    """A share as whole per cent: `percent(0.4)` is `40 %`."""
    return f"{100 * share:.0f} %"


def duration(seconds: float) -> str:
    """`duration(3725)` is `1 h 02 min`, `duration(125)` `2 min 05 s`, `duration(7.25)` `7.2 s`."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def is_dense(rung: Mapping[str, Any]) -> bool:
    """Whether a rung of `end_of_run` keeps everything, whatever rate was asked."""
    return rung["kept_heads"] == rung["kept_channels"] == 1


def is_measured(rung: Mapping[str, Any]) -> bool:
    """Whether the median speed of a rung of `end_of_run` comes from at least three steps."""
    return rung["steps_timed"] >= MINIMUM_STEPS


def dense_speed(rungs: Sequence[Mapping[str, Any]]) -> float | None:
    """Median tokens a second of the dense rung; None where there is none or it is not measured."""
    speeds = [r["tokens_per_second"] for r in rungs if is_dense(r) and is_measured(r)]
    return speeds[0] if speeds else None


def whole_run_speedup(rungs: Sequence[Mapping[str, Any]]) -> float | None:
    """Dense time ÷ time of this run for the same tokens, both from the rungs' median speeds.

    Takes the rungs of `end_of_run`. None where one of them is not measured, or none is dense.
    """
    reference = dense_speed(rungs)
    if reference is None or not all(map(is_measured, rungs)):
        return None
    seconds = sum(rung["tokens"] / rung["tokens_per_second"] for rung in rungs)
    return sum(rung["tokens"] for rung in rungs) / reference / seconds


def first_rung_speedup(
    rungs: Sequence[Mapping[str, Any]], reference: float | None = None
) -> float | None:
    """Speed of the first rung that omits anything ÷ that of the dense one, both medians; a run
    without a dense rung is held against `reference`, tokens a second. None where one is unknown."""
    dense, first = dense_speed(rungs) or reference, first_rung(rungs)
    if dense is None or first is None or not is_measured(first):
        return None
    speed: float = first["tokens_per_second"]
    return speed / dense


def first_rung(rungs: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """The first rung that omits anything; a run may start densely. None of a dense run."""
    return next((rung for rung in rungs if not is_dense(rung)), None)


def end_of_run(summary: Mapping[str, Any]) -> str:
    """What a run says when it ends: quality, speed by rung, cost, paths, what to try next.

    Reads these keys of `summary.json`; a missing one is a `KeyError`:

    - `perplexity_before`, `perplexity_after`: held-out, dense, per token; None: infinite;
    - `rungs`: in order of the run, one mapping each with
      `omission_rate` (asked), `kept_heads`, `kept_channels` (realised shares
      of all query heads and all channels, 0 to 1), `tokens` and `steps` (trained on this rung),
      `tokens_per_second` (median over the timed steps; None if none), `steps_timed` (steps during
      which nothing was compiled or moved), `bound` (dense FLOPs ÷ FLOPs of the rung);
    - `spent_flops` (training and probes) and `dense_flops` (the same tokens, dense);
    - `seconds`: wall time by part, with `total`;
    - `figures`: paths of the pictures; `export`: path of the exported model, or None.

    And these where they are known: `perplexity_dense`, after a dense run on the same tokens;
    `next_commands`, shell commands to try next.

    A speed from fewer than three timed steps is shown as `-`.
    """
    parts = [
        ("Held-out perplexity", _quality(summary)),
        ("Speed of each rung: kept shares, median tokens/s, speed-up over the dense rung and its"
         " FLOP bound", _speed(summary)),
        ("Cost", _cost(summary)),
        ("Written", _paths(summary)),
        ("Next", list(summary.get("next_commands", ()))),
    ]  # fmt: skip
    return "\n\n".join(
        "\n".join([title, *(f"  {line}" for line in lines)]) for title, lines in parts if lines
    )


def _quality(summary: Mapping[str, Any]) -> list[str]:
    before, after = summary["perplexity_before"], summary["perplexity_after"]
    rows = [
        [name, "infinite" if value is None else f"{value:.3f}", ""]
        for name, value in (("before", before), ("after", after))
    ]
    dense = summary.get("perplexity_dense")
    if dense is not None and after is not None:
        gap = f"{100 * (after / dense - 1):+.1f} %"
        rows.append(["dense run", f"{dense:.3f}", f"on the same tokens; this run is {gap} from it"])
    return _block(rows, ("left", "right", "left"))


def _speed(summary: Mapping[str, Any]) -> list[str]:
    rungs = summary["rungs"]
    reference = dense_speed(rungs)
    rows = []
    for rung in rungs:
        speed = rung["tokens_per_second"] if is_measured(rung) else None
        rows.append(
            [
                "dense" if is_dense(rung) else f"{rung['omission_rate']:.2f}",
                percent(rung["kept_heads"]),
                percent(rung["kept_channels"]),
                str(rung["steps"]),
                str(rung["steps_timed"]),
                f"{speed:,.0f}" if speed else "-",
                f"{speed / reference:.2f}x" if speed and reference else "-",
                f"{rung['bound']:.2f}x",
            ]
        )
    header = ("rate", "heads", "channels", "steps", "timed", "tokens/s", "speed-up", "bound")
    lines = fixed_width(header, rows, ("left", *("right",) * 7)).splitlines()
    if not all(map(is_measured, rungs)):
        lines.append(
            f"A step is timed while nothing compiles; fewer than {MINIMUM_STEPS} give no speed."
        )
    if not any(map(is_dense, rungs)):
        lines.append("No rung is dense, so there is no speed-up to tell.")
    whole = whole_run_speedup(rungs)
    if whole is not None:
        bound = summary["dense_flops"] / summary["spent_flops"]
        lines.append(f"The whole run: {whole:.2f}x, bound {bound:.2f}x (from these medians).")
    return lines


def _cost(summary: Mapping[str, Any]) -> list[str]:
    spent, dense = summary["spent_flops"], summary["dense_flops"]
    rows = [
        ["FLOPs", quantity(spent, "FLOP"), f"{percent(spent / dense)} of {quantity(dense, 'FLOP')}"]
    ]
    rows[0][2] += " for the same tokens, dense"
    seconds = summary["seconds"]
    parts = sorted((part for part in seconds if part != "total"), key=seconds.get, reverse=True)
    shares = [f"{part} {percent(seconds[part] / seconds['total'])}" for part in parts]
    shown = [share for part, share in zip(parts, shares, strict=True) if seconds[part] > 0]
    rows.append(["time", duration(seconds["total"]), ", ".join(shown)])
    return _block(rows, ("left", "right", "left"))


def _paths(summary: Mapping[str, Any]) -> list[str]:
    names = ["pictures", *[""] * len(summary["figures"])]
    rows = [[name, path] for name, path in zip(names, summary["figures"], strict=False)]
    if summary["export"] is not None:
        rows.append(["model", summary["export"]])
    return _block(rows, ("left", "left"))


def _block(rows: Sequence[Sequence[str]], align: Sequence[Align]) -> list[str]:
    """Lines of a table without a header."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [_line(row, widths, align, "  ").rstrip() for row in rows]
