"""Tables as Markdown, LaTeX and CSV."""

import csv
import io
import re
from collections.abc import Sequence

from sat_jax.analysis.tables import markdown
from sat_jax.report.cells import Table

_LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_",
    "{": r"\{", "}": r"\}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
    "±": r"$\pm$", "×": r"$\times$", "≈": r"$\approx$", "÷": r"$\div$",
    "†": r"$^\dagger$", "‡": r"$^\ddagger$", "§": r"\S{}",
}  # fmt: skip


def as_markdown(tables: Sequence[Table]) -> str:
    """A heading a kind of table; under each table what it holds."""
    parts, heading = [], ""
    for table in tables:
        if table.title != heading:
            heading = table.title
            parts.append(f"## {heading}")
        parts.append(markdown(table.header, table.texts, table.align))
        parts.append("\n".join([f"*{table.caption}*", *table.notes]))
    return "\n\n".join(parts) + "\n"


def as_latex(tables: Sequence[Table]) -> str:
    r"""For a document with `\usepackage{booktabs}`."""
    parts = [r"% \usepackage{booktabs}"]
    for table in tables:
        columns = "".join("r" if side == "right" else "l" for side in table.align)
        body = [" & ".join(map(_escaped, row)) + r" \\" for row in table.texts]
        notes = " ".join([f"{table.title}: {table.caption}.", *table.notes])
        parts.append(
            "\n".join(
                [
                    r"\begin{table}",
                    r"\centering",
                    rf"\begin{{tabular}}{{{columns}}}",
                    r"\toprule",
                    " & ".join(map(_escaped, table.header)) + r" \\",
                    r"\midrule",
                    *body,
                    r"\bottomrule",
                    r"\end{tabular}",
                    rf"\caption{{{_escaped(notes)}}}",
                    r"\end{table}",
                ]
            )
        )
    return "\n\n".join(parts) + "\n"


def as_csv(table: Table) -> str:
    """All digits: where any cell of a column has an error, a column `NAME error` follows it. Two
    columns of one name are told apart by the column before them."""
    columns = range(len(table.header))
    names = [
        f"{table.header[i - 1]} {name}" if table.header.count(name) > 1 else name
        for i, name in enumerate(table.header)
    ]
    with_error = [any(row[i].error is not None for row in table.rows) for i in columns]
    lines = [
        [part for i in columns for part in [names[i], f"{names[i]} error"][: 1 + with_error[i]]]
    ]
    for row in table.rows:
        line = []
        for cell, two in zip(row, with_error, strict=True):
            line.append(cell.text if cell.value is None else repr(cell.value))
            if two:
                line.append("" if cell.error is None else repr(cell.error))
        lines.append(line)
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(lines)
    return text.getvalue()


def _escaped(text: str) -> str:
    return re.sub("|".join(map(re.escape, _LATEX)), lambda found: _LATEX[found.group()], text)
