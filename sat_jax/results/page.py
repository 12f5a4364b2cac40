"""A report on finished runs: one HTML page, and its tables in Markdown."""

import dataclasses
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import jinja2

from sat_jax.errors import UserError, folder_error
from sat_jax.results.compression import compression_figure, compression_tables
from sat_jax.results.context_figures import context_figures
from sat_jax.results.evaluations import evaluation_tables
from sat_jax.results.extension import extension_figure, extension_tables
from sat_jax.results.figures import quality_figure, svg
from sat_jax.results.from_scratch import from_scratch_tables
from sat_jax.results.positions import position_tables
from sat_jax.results.rows import Row, device_name
from sat_jax.results.sweep import Comparison
from sat_jax.results.tables import (
    Table,
    across_tables,
    group_labels,
    group_tables,
    model_of,
    quality_table,
    sentence,
)
from sat_jax.results.variants import Group, make_groups
from sat_jax.train.files import write_atomically

_TEMPLATE = Path(__file__).parent / "page.html"
_QUALITY = (
    "Perplexity from dense training against FLOPs, of every variant",
    "Down and left is better. The line joins dense training and dense training of fewer steps:"
    " below it is better than dense training at equal FLOPs. Bars are standard errors over seeds.",
)

_EXTENSION = (
    "Perplexity against context length, by scaling of rotary positions",
    "Means over seeds. Left without training, right after training with the scaling.",
)
_COMPRESSION = (
    "Perplexity against size and FLOPs, by method of compression",
    "The line joins those that no other method beats in both.",
)


@dataclasses.dataclass(frozen=True)
class Picture:
    """A figure as a data URI, with its description and its caption."""

    source: str
    description: str
    caption: str


@dataclasses.dataclass(frozen=True)
class Section:
    """A part of the page: figures, a sentence per variant, tables."""

    title: str
    tables: Sequence[Table]
    pictures: Sequence[Picture] = ()
    sentences: Sequence[str] = ()

    def markdown(self) -> str:
        """Return the section without its figures."""
        sentences = "\n".join(f"- {text}" for text in self.sentences)
        tables = [f"### {table.title}\n\n{table.markdown()}" for table in self.tables]
        return "\n\n".join(filter(None, [f"## {self.title}", sentences, *tables]))


def write_report(rows: Sequence[Row], comparisons: Sequence[Comparison], out: Path) -> list[Path]:
    """Write `report.html` and `tables.md` into the folder `out`, which is made; return their paths.

    `rows` are those of runs and of `scripts.evaluate --record`. Raises `UserError` if there are
    none, or if the folder cannot be made.
    """
    # Sweeps of one experiment declare the same comparisons.
    sections = list(_sections(make_groups(rows), list(dict.fromkeys(comparisons))))
    if tables := from_scratch_tables(rows):
        sections.insert(0, Section("Pre-training from scratch", tables))
    if tables := extension_tables(rows):
        pictures = [Picture(svg(figure), *_EXTENSION)] if (figure := extension_figure(rows)) else []
        sections.append(Section("Extended contexts", tables, pictures))
    if tables := compression_tables(rows):
        figure = compression_figure(rows)
        pictures = [Picture(svg(figure), *_COMPRESSION)] if figure else []
        sections.append(Section("Compression", tables, pictures))
    if tables := evaluation_tables(rows):
        pictures = [
            Picture(svg(figure), "Measurements against context length", caption)
            for caption, figure in context_figures(rows)
        ]
        sections.append(Section("Evaluations", position_tables(rows) + tables, pictures))
    if not sections:
        raise UserError("no finished run and no evaluation to report on")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {out}: {folder_error(error)}") from error
    texts = {
        "report.html": _html(sections, rows),
        "tables.md": "\n\n".join(section.markdown() for section in sections) + "\n",
    }
    for name, text in texts.items():
        write_atomically(out / name, text)
    return [out / name for name in texts]


def _sections(groups: Sequence[Group], comparisons: Sequence[Comparison]) -> Iterator[Section]:
    """Yield a section for each group with two or more sparse variants, largest first, and one with
    the comparisons across groups and all smaller groups."""
    labels = dict(zip(map(id, groups), group_labels(groups), strict=True))
    ordered = sorted(groups, key=lambda group: -sum(len(v.runs) for v in group.variants))
    large = [group for group in ordered if len(group.sparse) > 1] or ordered[:1]
    for group in large:
        figure = quality_figure(group)
        yield Section(
            ": ".join(filter(None, [model_of(group.runs[0]), labels[id(group)]])),
            group_tables(group, comparisons),
            [Picture(svg(figure), *_QUALITY)] if figure else [],
            [sentence(variant) for variant in group.variants if not variant.is_baseline],
        )
    tables = across_tables(groups, comparisons)
    if small := [group for group in ordered if group not in large]:
        tables.append(quality_table(small, "Other settings"))
    if tables:
        yield Section("Other learning rates, lengths and data", tables)


def _html(sections: Sequence[Section], rows: Sequence[Row]) -> str:
    """Return one HTML document without references to anything outside it."""
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    origin = {
        "Device": Counter(device_name(row["device"]) for row in rows),
        "Commit": Counter((row["commit"] or "unknown")[:10] for row in rows),
        "Day": Counter(row["date"][:10] for row in rows),
        "Versions": Counter(
            ", ".join(f"{k} {v}" for k, v in row["versions"].items() if v) for row in rows
        ),
    }
    template = environment.from_string(_TEMPLATE.read_text(encoding="utf-8"))
    return template.render(sections=sections, origin=origin, count=len(rows))
