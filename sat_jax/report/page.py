"""A report as one HTML page, and its tables as Markdown, LaTeX and CSV."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2

from sat_jax.analysis.rows import Row
from sat_jax.errors import UserError, why_no_folder
from sat_jax.report.cells import Table
from sat_jax.report.evaluations import tables_of_evaluations
from sat_jax.report.figures import Picture, pictures_of
from sat_jax.report.groups import Group, make_groups
from sat_jax.report.records import Record, newest
from sat_jax.report.render import as_csv, as_latex, as_markdown
from sat_jax.report.tables import tables_of
from sat_jax.train.files import write_atomically

_TEMPLATE = Path(__file__).parent / "page.html"


def write_report(records: Sequence[Record], out: Path, evaluated: Sequence[Row] = ()) -> list[Path]:
    """Writes `report.html`, `tables.md`, `tables.tex` and a CSV file a table into the folder `out`,
    which is made; returns their paths. `evaluated` are rows of evaluations. Raises
    `UserError` where it cannot be."""
    runs = newest(records)
    groups = make_groups(runs)
    tables = [*tables_of(groups), *tables_of_evaluations(evaluated)]
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {out}: {why_no_folder(error)}") from error
    texts = {
        "report.html": page(groups, tables, repeated=len(records) - len(runs)),
        "tables.md": as_markdown(tables),
        "tables.tex": as_latex(tables),
    }
    many, number = Counter(table.name for table in tables), Counter[str]()
    for table in tables:
        number[table.name] += 1
        end = f"-{number[table.name]}" if many[table.name] > 1 else ""
        texts[f"{table.name}{end}.csv"] = as_csv(table)
    for name, text in texts.items():
        write_atomically(out / name, text)
    return [out / name for name in texts]


def page(groups: Sequence[Group], tables: Sequence[Table], repeated: int = 0) -> str:
    """One HTML document without a reference to anything outside it; `repeated` is how many runs
    were left out for a newer one of the same settings."""
    sections: dict[str, list[Table]] = {}
    for table in tables:
        sections.setdefault(table.title, []).append(table)
    pictures: dict[str, list[Picture]] = {}
    for group in groups:
        for picture in pictures_of(group):
            pictures.setdefault(picture.heading, []).append(picture)
    runs = [run for group in groups for run in group.all_runs]
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string(_TEMPLATE.read_text(encoding="utf-8"))
    return template.render(
        runs=runs, repeated=repeated, sections=sections, pictures=pictures, origin=origin(runs)
    )


def origin(runs: Sequence[Record]) -> list[tuple[str, list[str]]]:
    """Where the runs come from: each name with the values that occur, and how many runs have it
    where there are several."""
    dates = sorted(run.row["date"][:10] for run in runs)
    between = dates[0] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}"
    return [
        ("Device", _counted([run.device for run in runs])),
        ("Commit", _counted([run.commit for run in runs])),
        ("Date", [between]),
        ("Data", _counted([run.row["data"] for run in runs])),
        ("Versions", _counted([_versions(run.row["versions"]) for run in runs])),
    ]


def _versions(versions: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in versions.items() if value)


def _counted(values: Sequence[str]) -> list[str]:
    counts = Counter(values)
    if len(counts) == 1:
        return list(counts)
    return [f"{value} ({n} run{'s' if n > 1 else ''})" for value, n in counts.items()]
