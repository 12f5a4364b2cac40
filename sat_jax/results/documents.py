"""Tables and pictures in documents, made from committed rows.

    <!-- table: FILE.KIND [FIELD=START[,START...] ...] -->
    this text is replaced
    <!-- /table -->

`python -m scripts.tables --help` says what FILE, KIND, FIELD and START are.
"""

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from sat_jax.config_values import find
from sat_jax.errors import UserError
from sat_jax.results.benchmarks import (
    blocks_table,
    memory_tables,
    moves_table,
    peer_tables,
    steps_table,
)
from sat_jax.results.compression import compression_figure, compression_tables
from sat_jax.results.evaluations import evaluation_tables
from sat_jax.results.extension import extension_figure, extension_tables
from sat_jax.results.figures import quality_figure
from sat_jax.results.from_scratch import from_scratch_tables
from sat_jax.results.positions import position_tables
from sat_jax.results.retention import retention_figure, retention_tables
from sat_jax.results.rows import Row, read
from sat_jax.results.sweep import Comparison
from sat_jax.results.tables import across_tables, group_tables, quality_table
from sat_jax.results.variants import make_groups

TABLE = re.compile(
    r"^(<!-- table: (\S+)\.(\w+)((?: [\w.]+=\S+)*) -->\n)(?P<text>.*?)^(<!-- /table -->)$",
    re.DOTALL | re.MULTILINE,
)
_MARK = re.compile(r"^[ \t]*<!--\s*/?\s*table\b.*", re.IGNORECASE | re.MULTILINE)
_DIGEST = "Rows"  # the PNG text that names the rows of a picture


def outdated(root: Path, results: Path, comparisons: Sequence[Comparison]) -> dict[Path, str]:
    """Return the documents whose tables differ from what the rows in `results` give, with their new
    text. Raises `UserError`, naming document and mark, for a table that cannot be made."""
    paths = [root / "README.md", root / "experiments/README.md", *sorted(root.glob("docs/*.md"))]
    texts = {path: path.read_text(encoding="utf-8") for path in paths}
    filled = {path: fill(text, results, str(path), comparisons) for path, text in texts.items()}
    return {path: text for path, text in filled.items() if text != texts[path]}


def fill(text: str, results: Path, origin: str, comparisons: Sequence[Comparison]) -> str:
    """Return `text` with every marked table made from the rows in `results`.

    Raises `UserError` for marks that are malformed or not in pairs.
    """

    def filled(match: re.Match[str]) -> str:
        opening, stem, kind, fields, _, closing = match.groups()
        try:
            filters = dict(field.split("=", 1) for field in fields.split())
            return f"{opening}\n{_table(results, stem, kind, filters, comparisons)}\n\n{closing}"
        except UserError as error:
            raise UserError(f"{origin}: {opening.strip()}: {error}") from error

    marks, pairs = _MARK.findall(text), [*TABLE.finditer(text)]
    if len(marks) != 2 * len(pairs):
        raise UserError(
            f"{origin}: {len(marks)} table marks make {len(pairs)} pairs, so that one is malformed"
            " or not one of a pair; accepted: <!-- table: FILE.KIND [FIELD=START ...] --> on a line"
            " of its own, then <!-- /table -->"
        )
    return TABLE.sub(filled, text)


def _matches(row: Mapping[str, Any], field: str, starts: str) -> bool:
    value = row.get(field, "")
    if field not in row and "settings" in row:
        settings = row["settings"]
        value = settings[field] if field in settings else find(field).default
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value).startswith(tuple(starts.split(",")))
    try:
        return value in [float(start) for start in starts.split(",")]
    except ValueError:
        raise UserError(f"{field}={starts} is no number, as the rows have there") from None


def _table(
    results: Path,
    stem: str,
    kind: str,
    filters: Mapping[str, str],
    comparisons: Sequence[Comparison],
) -> str:
    rows = [
        row
        for row in read(results / f"{stem}.jsonl")
        if all(_matches(row, field, starts) for field, starts in filters.items())
    ]
    groups = make_groups(rows)
    tables = across_tables(groups, comparisons) + evaluation_tables(rows)
    for made in (
        *(steps_table, peer_tables, blocks_table, moves_table, memory_tables),
        *(from_scratch_tables, retention_tables, extension_tables, position_tables),
        compression_tables,
    ):
        tables += made(rows)
    for group in groups:
        tables += [quality_table([group]), *group_tables(group, comparisons)]
    wanted = [table.markdown() for table in tables if table.name == kind]
    if not wanted:
        names = ", ".join(dict.fromkeys(table.name for table in tables)) or "none"
        raise UserError(f"no rows for {kind}; there are rows for: {names}")
    return "\n\n".join(wanted)


def draw(rows: Path, picture: Path) -> None:
    """Draw the figure that `picture` is named after as a PNG.

    Raises `UserError` if there is nothing to draw.
    """
    figure = _FIGURES[picture.stem](read(rows))
    if figure is None:
        raise UserError(f"{rows}: no rows for {picture.name}")
    picture.parent.mkdir(parents=True, exist_ok=True)
    digest = _digest(rows, picture)
    figure.savefig(picture, format="png", metadata={"Software": None, _DIGEST: digest})


def is_outdated(rows: Path, picture: Path) -> bool:
    """Return whether a picture is missing or of other rows; one without rows may be missing.

    Rows are compared and not pixels, which depend on the versions of matplotlib and its fonts.
    """
    if not picture.exists():
        return bool(_lines(rows, picture))
    # A PNG's tEXt chunk: keyword, a zero byte, the text.
    text = f"{_DIGEST}\0{_digest(rows, picture)}".encode()
    return text not in picture.read_bytes()


def _study_figure(rows: Sequence[Row]) -> Figure | None:
    """Return the quality of the group of runs with the most variants; None if it has no sparse run
    with a dense baseline."""
    groups = make_groups(rows)
    return quality_figure(max(groups, key=lambda group: len(group.runs))) if groups else None


_FIGURES: dict[str, Callable[[Sequence[Row]], Figure | None]] = {
    "study": _study_figure,
    "retention": retention_figure,
    "context": extension_figure,
    "compression": compression_figure,
}
# What the rows of a picture have in common; the others of its file do not change it.
_FIELDS: dict[str, Mapping[str, Any]] = {"retention": {"benchmark": "retention"}}


def _lines(file: Path, picture: Path) -> list[bytes]:
    """Return the lines of a file that a picture shows."""
    if not file.exists():  # nothing is measured yet
        return []
    lines, fields = file.read_bytes().splitlines(keepends=True), _FIELDS.get(picture.stem)
    return [line for line in lines if not fields or fields.items() <= json.loads(line).items()]


def _digest(file: Path, picture: Path) -> str:
    return hashlib.sha256(b"".join(_lines(file, picture))).hexdigest()[:16]
