"""Tables of evaluations: rows of `scripts.evaluate --record`, not of runs."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from sat_jax.analysis.tables import sides
from sat_jax.config_values import name_of
from sat_jax.report.cells import Cell, Table
from sat_jax.report.records import SPARSE, Record
from sat_jax.report.wording import named, rate_of

Row = Mapping[str, Any]
_ASIDE = ("generations", "rows", "length", "stride")  # options of how it was done, or told anyway
_RATES = ("rate", "rate_attention", "rate_mlp", "layer_rates_attention", "layer_rates_mlp")


class _Kind(NamedTuple):
    """A table: `measures` are those of its rows, `asked` the columns that say more of what was
    asked, `figures` those that say what came out."""

    title: str
    measures: tuple[str, ...]
    asked: tuple[str, ...]
    figures: Mapping[str, Callable[[Row], Cell]]


def _figure(value: str, error: str | None = None, text: str = "{:.3f}") -> Callable[[Row], Cell]:
    """With its standard error, which one question alone does not have. None is what JSON has for
    a number that is not finite."""

    def cell(row: Row) -> Cell:
        if row[value] is None:
            return Cell("not finite")
        known = [row[key] for key in (value, error) if key and row[key] is not None]
        return Cell(" ± ".join(map(text.format, known)).replace("%", " %"), *known)

    return cell


_KINDS = {
    "perplexity": _Kind(
        "Perplexity of texts",
        ("text", "prepared"),
        (),
        {
            "tokens": _figure("tokens", text="{:,}"),
            "per token": _figure("perplexity"),
            "per byte": _figure("byte_perplexity"),
            "bits per byte": _figure("bits_per_byte"),
        },
    ),
    "choices": _Kind(
        "Multiple choice",
        ("choices",),
        (),
        {
            "accuracy": _figure("accuracy", "stderr", "{:.1%}"),
            "per byte": _figure("accuracy_per_byte", "stderr_per_byte", "{:.1%}"),
            "by chance": _figure("chance", text="{:.0%}"),
        },
    ),
    "answers": _Kind(
        "Generated answers",
        ("answers",),
        (),
        {
            "exact match": _figure("accuracy", "stderr", "{:.1%}"),
            "no result": _figure("no_result", text="{:.0%}"),
            "cut short": _figure("cut", text="{:.0%}"),
        },
    ),
    "harness": _Kind(
        "lm-evaluation-harness",
        ("lm_eval",),
        ("task", "metric"),
        {"value": _figure("value", "stderr")},
    ),
}
MEASURES = tuple(measure for kind in _KINDS.values() for measure in kind.measures)


def tables_of_evaluations(rows: Sequence[Row]) -> list[Table]:
    """Of each kind a table for each thing that was asked: figures compare where the same is asked
    in the same way. Models in the order of their first rows; of a model the newest row counts."""
    return [table for name in _KINDS for table in _of_kind(name, _KINDS[name], rows)]


def _of_kind(name: str, kind: _Kind, rows: Sequence[Row]) -> list[Table]:
    asked: dict[str, dict[tuple[str, ...], Row]] = {}
    for row in rows:
        if row.get("measure") in kind.measures:
            models = asked.setdefault(_asked(row), {})
            model = name_of(row["run"] or {"model": row["model"]})
            place = (model, *(str(row[key]) for key in kind.asked))
            models[place] = max(row, models.get(place, row), key=lambda one: one["date"])
    header = ("model", *kind.asked, *kind.figures)
    align = sides(1 + len(kind.asked), len(kind.figures))
    made = []
    for same, models in asked.items():
        body = _body(kind, models)
        devices = " and ".join(dict.fromkeys(Record(row).device for row in models.values()))
        errors = any(cell.error is not None for line in body for cell in line)
        over = ["± is the standard error over questions"] if errors else []
        caption = "; ".join([same, devices, *over])
        made.append(Table(name, kind.title, caption, header, align, tuple(body)))
    return made


def _body(kind: _Kind, models: Mapping[tuple[str, ...], Row]) -> list[tuple[Cell, ...]]:
    """A line a row; models of one name are told apart by their own."""
    names = {model: _name(row) for (model, *_), row in models.items()}
    many = Counter(names.values())
    return [
        (
            Cell(names[model] if many[names[model]] == 1 else f"{names[model]} ({model[:6]})"),
            *map(Cell, more),
            *(figure(row) for figure in kind.figures.values()),
        )
        for (model, *more), row in models.items()
    ]


def _asked(row: Row) -> str:
    """On what, how much of it, and how."""
    parts = [row["data"] if isinstance(row["data"], str) else ", ".join(row["data"])]
    if "questions" in row:
        parts.append(f"{row['questions']:,} questions")
    if "length" in row:
        parts.append(f"windows of {row['length']:,} with a stride of {row['stride']:,}")
    return "; ".join(filter(None, (", ".join(parts), _told(row))))


def _told(row: Row) -> str:
    """The options that figures depend on and that were given."""
    options = {key: value for key, value in row["options"].items() if key not in _ASIDE}
    return ", ".join(f"{key} {value}" for key, value in options.items() if value is not None)


def _name(row: Row) -> str:
    """The model; of a trained one on what, how sparsely, and its seed."""
    if row["run"] is None:
        return str(row["model"])
    settings = row["run"]["settings"]
    given = {
        key.rpartition(".")[2]: v for key, v in settings.items() if key.startswith("sparsity.")
    }
    sparse = SPARSE | {name: tuple(v) if isinstance(v, list) else v for name, v in given.items()}
    rest = {name: sparse[name] for name in given if name not in _RATES}
    rate = rate_of(sparse)
    how = "dense" if rate == "0" else named({"rate": rate, **rest})
    return f"{', '.join(settings['data.sources'])}: {how}, seed {row['run']['seed']}"
