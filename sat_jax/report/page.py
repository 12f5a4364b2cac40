"""A report as one HTML page, and its tables as Markdown, LaTeX and CSV."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2

from sat_jax.analysis.rows import Row
from sat_jax.errors import UserError, folder_error
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
    which is made; returns their paths. `evaluated` are rows of evaluations. Raises `UserError`
    where it cannot be."""
    runs = newest(records)
    groups = make_groups(runs)
    tables = [*tables_of(groups), *tables_of_evaluations(evaluated)]
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {out}: {folder_error(error)}") from error
    texts = {
        "report.html": page(groups, tables, evaluated, repeated=len(records) - len(runs)),
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


def page(
    groups: Sequence[Group], tables: Sequence[Table], evaluated: Sequence[Row], repeated: int
) -> str:
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
        what=" and ".join(filter(None, [_many(runs, "run"), _many(evaluated, "evaluation")])),
        runs=runs,
        repeated=repeated,
        sections=sections,
        pictures=pictures,
        origin=_origin([*runs, *map(Record, evaluated)]),
    )


def _origin(rows: Sequence[Record]) -> list[tuple[str, list[str]]]:
    """Where runs and evaluations come from: each name with the values that occur, and how many rows
    have it where there are several."""
    dates = sorted(one.row["date"][:10] for one in rows)
    between = dates[0] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}"
    return [
        ("Device", _counted([one.device for one in rows])),
        ("Commit", _counted([one.commit for one in rows])),
        ("Date", [between]),
        ("Data", _counted([_data(one.row["data"]) for one in rows])),
        ("Versions", _counted([_versions(one.row["versions"]) for one in rows])),
    ]


def _many(rows: Sequence[Any], name: str) -> str:
    return f"{len(rows)} {name}{'s' * (len(rows) > 1)}" if rows else ""


def _data(data: str | list[str]) -> str:
    """Of a run what its data are called, of an evaluation its texts."""
    return data if isinstance(data, str) else ", ".join(data)


def _versions(versions: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in versions.items() if value)


def _counted(values: Sequence[str]) -> list[str]:
    counts = Counter(values)
    if len(counts) == 1:
        return list(counts)
    return [f"{value} ({n} of {len(values)})" for value, n in counts.items()]
