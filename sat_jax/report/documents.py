"""Tables in documents, made from committed rows.

    <!-- table: FILE.KIND [FIELD=START[,START...] ...] -->
    what stands here is replaced
    <!-- /table -->

FILE is a file of rows, `experiments/results/FILE.jsonl`; KIND is a table of `sat_jax.report.tables`
(rates, metrics, ..., efficiency), of `sat_jax.report.sizes` (steps, memory, speed, kernels) or of
`sat_jax.report.evaluations` (perplexity, choices, answers, harness). Only
rows count whose FIELD (twin, data, commit, ..., or a setting that the run was given, by its dotted
path) starts with a START, or, being a number, equals one.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sat_jax.analysis.rows import read
from sat_jax.analysis.tables import markdown
from sat_jax.errors import UserError
from sat_jax.report import sizes
from sat_jax.report.evaluations import tables_of_evaluations
from sat_jax.report.groups import make_groups
from sat_jax.report.records import newest, record_of
from sat_jax.report.tables import tables_of

RESULTS = Path("experiments") / "results"
_OPEN = re.compile(r"<!-- table: (\S+)((?: [\w.]+=\S+)*) -->\n")
_CLOSE = "<!-- /table -->"
_LIKE = re.compile(r"^[ \t]*<!--\s*/?\s*table\b.*\n?", re.IGNORECASE | re.MULTILINE)
_FORM = f"accepted: <!-- table: FILE.KIND [FIELD=START ...] --> on a line of its own, then {_CLOSE}"


def documents(root: Path) -> list[Path]:
    """Where tables may be marked."""
    return [root / "README.md", root / "experiments" / "README.md", *sorted(root.glob("docs/*.md"))]


def outdated(root: Path) -> dict[Path, str]:
    """The documents that are not what the rows make of them, with what they should be.

    Raises `UserError`, naming document and mark, for a table that cannot be made.
    """
    texts = {path: path.read_text(encoding="utf-8") for path in documents(root)}
    made = {path: filled(text, root / RESULTS, str(path)) for path, text in texts.items()}
    return {path: text for path, text in made.items() if text != texts[path]}


def filled(text: str, results: Path, origin: str) -> str:
    """`text` with every marked table made anew from the rows in `results`. Raises `UserError` for
    what looks like a mark and is none."""
    for like in _LIKE.finditer(text):
        if not (_OPEN.fullmatch(like.group()) or like.group().rstrip() == _CLOSE):
            raise UserError(f"{origin}: {like.group().strip()} is no mark of a table; {_FORM}")
    parts, place, closed = [], 0, 0
    while mark := _OPEN.search(text, place):
        end = text.find(_CLOSE, mark.end())
        following = _OPEN.search(text, mark.end())
        if end < 0 or (following and following.start() < end):
            raise UserError(f"{origin}: {mark.group().strip()} is not closed by {_CLOSE}")
        fields = dict(field.split("=", 1) for field in mark.group(2).split())
        try:
            table = _table(results, mark.group(1), fields)
        except UserError as error:
            raise UserError(f"{origin}: {mark.group().strip()}: {error}") from error
        parts += [text[place : mark.end()], f"\n{table}\n\n"]
        place, closed = end, closed + 1
    if text.count(f"\n{_CLOSE}") + text.startswith(_CLOSE) > closed:
        raise UserError(f"{origin}: {_CLOSE} without a table that begins; {_FORM}")
    return "".join([*parts, text[place:]])


def _matches(row: Mapping[str, Any], field: str, starts: str) -> bool:
    """One of `starts`: numbers as a whole, and texts by how they start. Raises `UserError` for no
    number where rows have one."""
    value = row.get("settings", {}).get(field, "") if "." in field else row.get(field, "")
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value).startswith(tuple(starts.split(",")))
    try:
        return value in [float(start) for start in starts.split(",")]
    except ValueError:
        raise UserError(f"{field}={starts} is no number, as the rows have there") from None


def _table(results: Path, name: str, fields: Mapping[str, str]) -> str:
    stem, _, kind = name.rpartition(".")
    rows = [
        row
        for row in read(results / f"{stem}.jsonl")
        if all(_matches(row, field, starts) for field, starts in fields.items())
    ]
    if kind in sizes.TABLES:
        return sizes.TABLES[kind](rows)
    runs = newest(record_of(row, None, stem) for row in rows if "twin" in row)
    tables = [*tables_of(make_groups(runs)), *tables_of_evaluations(rows)]
    found = [table for table in tables if table.name == kind]
    if not found:
        there = ", ".join(dict.fromkeys(table.name for table in tables)) or "none"
        raise UserError(f"no rows for {kind}; there are rows for: {there}")
    parts = []
    for table in found:
        parts.append(markdown(table.header, table.texts, table.align))
        parts.append(" ".join([f"{table.caption}.", *table.notes]))
    return "\n\n".join(parts)
