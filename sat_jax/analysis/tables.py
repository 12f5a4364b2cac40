"""Tables as text: fixed width for a terminal, Markdown for a README, and the end of a run."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

Align = Literal["left", "right"]

_MINIMUM_STEPS = 3  # a median of fewer is not a measurement


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


def _speed_rows(rungs: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    dense = next((rung for rung in rungs if rung["omission_rate"] == 0), None)
    reference = dense["tokens_per_second"] if dense and _measured(dense) else None
    rows = []
    for rung in rungs:
        speed = rung["tokens_per_second"] if _measured(rung) else None
        gain = speed / reference if speed and reference else None
        rate = rung["omission_rate"]
        rows.append(
            [
                f"{rate:.2f}" if rate else "dense",
                percent(rung["kept_heads"]),
                percent(rung["kept_channels"]),
                str(rung["steps"]),
                str(rung["steps_timed"]),
                f"{speed:,.0f}" if speed else "-",
                f"{gain:.2f}x" if gain else "-",
                f"{rung['bound']:.2f}x",
            ]
        )
    return rows


def _measured(rung: Mapping[str, Any]) -> bool:
    return rung["steps_timed"] >= _MINIMUM_STEPS


def whole_run_speedup(rungs: Sequence[Mapping[str, Any]]) -> float | None:
    """Dense time ÷ time of this run for the same tokens, both from the rungs' median speeds.

    Takes the rungs of `end_of_run`. None where a rung, or the dense rung, has fewer than three
    timed steps.
    """
    dense = [rung for rung in rungs if rung["omission_rate"] == 0]
    if not dense or not all(_measured(rung) for rung in rungs):
        return None
    seconds = sum(rung["tokens"] / rung["tokens_per_second"] for rung in rungs)
    return sum(rung["tokens"] for rung in rungs) / dense[0]["tokens_per_second"] / seconds


def end_of_run(summary: Mapping[str, Any]) -> str:
    """What a run says when it ends: quality, speed by rung, FLOPs, paths, what to try next.

    Reads these keys of `summary` (a missing one is a `KeyError`):

    - `perplexity_before`, `perplexity_after`: held-out, dense, per token;
    - `perplexity_dense`: the same after a dense run on the same tokens, or None if unknown;
    - `rungs`: in order of the run, one mapping each with
      `omission_rate` (asked; 0 is the dense rung), `kept_heads`, `kept_channels` (realised shares
      of all query heads and all channels, 0 to 1), `tokens` and `steps` (trained on this rung),
      `tokens_per_second` (median over the timed steps; None if none), `steps_timed` (steps that
      overlap no compilation), `bound` (dense FLOPs ÷ FLOPs of the rung);
    - `spent_flops` (probes included), `dense_flops` (the same tokens, dense): training FLOPs;
    - `figures`: paths of the pictures; `export`: path of the exported model or None;
    - `next_commands`: shell commands to try next.

    A speed from fewer than three timed steps is shown as `-`.
    """
    before, after = summary["perplexity_before"], summary["perplexity_after"]
    reference = summary["perplexity_dense"]
    rungs = summary["rungs"]
    spent, dense_flops = summary["spent_flops"], summary["dense_flops"]

    quality = [["before", f"{before:.3f}", ""], ["after", f"{after:.3f}", ""]]
    if reference is not None:
        gap = f"{100 * (after / reference - 1):+.1f} % from it"
        quality.append(["dense run", f"{reference:.3f}", f"same tokens; this run ends {gap}"])
    speed = fixed_width(
        ("rate", "heads", "channels", "steps", "timed", "tokens/s", "speed-up", "bound"),
        _speed_rows(rungs),
        ("left", *("right",) * 7),
    )
    whole = whole_run_speedup(rungs)
    notes = []
    if any(not _measured(rung) for rung in rungs):
        notes.append(f"- : fewer than {_MINIMUM_STEPS} timed steps, on this rung or the dense one")
    if whole is not None:
        limit = f"bound {dense_flops / spent:.2f}x"
        notes.append(f"Whole run {whole:.2f}x the dense speed ({limit}), compilation apart")
    costs = [
        ["FLOPs spent", quantity(spent, "FLOP"), f"{percent(spent / dense_flops)} of dense"],
        ["FLOPs dense", quantity(dense_flops, "FLOP"), ""],
    ]
    paths = [["pictures" if not i else "", path] for i, path in enumerate(summary["figures"])]
    if summary["export"] is not None:
        paths.append(["model", summary["export"]])

    parts = [
        "Held-out perplexity\n" + _block(quality),
        "Speed: kept share and median speed of each rung, speed-up over the dense rung, FLOP bound"
        "\n" + _indent("\n".join([speed, *notes])),
        "Cost\n" + _block(costs),
    ]
    if paths:
        parts.append("Written\n" + _block(paths))
    if summary["next_commands"]:
        parts.append("Next\n" + _indent("\n".join(summary["next_commands"])))
    return "\n\n".join(parts)


def _block(rows: Sequence[Sequence[str]]) -> str:
    """Rows without a header, indented; the second column of numbers is set flush right."""
    numbers = len(rows[0]) == 3
    align: list[Align] = ["left", "right", "left"] if numbers else ["left", "left"]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return _indent("\n".join(_line(row, widths, align, "  ").rstrip() for row in rows))


def _indent(text: str) -> str:
    return "\n".join("  " + line for line in text.splitlines())
