"""Tables and numbers as text: fixed width for a terminal, Markdown for documents."""

from collections.abc import Sequence


def fixed_width(header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Return a table with a rule under the header, without trailing spaces.

    The first `left` columns are aligned to the left, the others to the right. Raises `ValueError`
    for a row of another length than `header`.
    """
    widths = _widths(header, rows)
    rule = ["-" * width for width in widths]
    return "\n".join(_line(cells, widths, left, "  ").rstrip() for cells in (header, rule, *rows))


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Return the same table in Markdown, padded so that its source is readable."""
    escaped = [[cell.replace("|", "\\|") for cell in cells] for cells in (header, *rows)]
    widths = [max(width, 3) for width in _widths(escaped[0], escaped[1:])]
    rule = [
        "-" * (width - 1) + ("-" if column < left else ":") for column, width in enumerate(widths)
    ]
    lines = [_line(cells, widths, left, " | ") for cells in (escaped[0], rule, *escaped[1:])]
    return "\n".join(f"| {line} |" for line in lines)


def _widths(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[int]:
    return [max(map(len, column)) for column in zip(header, *rows, strict=True)]


def _line(cells: Sequence[str], widths: Sequence[int], left: int, gap: str) -> str:
    return gap.join(
        cell.ljust(width) if column < left else cell.rjust(width)
        for column, (cell, width) in enumerate(zip(cells, widths, strict=True))
    )


def quantity(value: float, unit: str) -> str:
    """Format with an SI prefix: `quantity(2.5e14, 'FLOP')` is `250.0 TFLOP`."""
    for prefix in ("", "k", "M", "G", "T", "P", "E"):
        if abs(value) < 999.95 or prefix == "E":
            break
        value /= 1000
    digits = 1 if prefix and abs(value) >= 100 else 2 if prefix else 0
    return f"{value:.{digits}f} {prefix}{unit}"


def percent(share: float) -> str:
    """Format a share: `percent(0.4)` is `40 %`."""
    return f"{100 * share:.0f} %"


def setting_text(value: object) -> str:
    """Format the value of a setting: tuples with commas, `none` if empty."""
    if isinstance(value, list | tuple):
        return ",".join(map(setting_text, value)) or "none"
    return f"{value:g}" if isinstance(value, float) else str(value)
