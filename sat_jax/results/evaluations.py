"""Tables of evaluations: rows of `scripts.evaluate --record`."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

from sat_jax.config_values import name_of
from sat_jax.results.finished import DEFAULTS
from sat_jax.results.rows import device_name
from sat_jax.results.tables import Table
from sat_jax.results.variants import variant_name

Row: TypeAlias = Mapping[str, Any]
_NOT_SHOWN = ("generations", "rows", "length", "stride")  # options without effect, or shown anyway


class _Column(NamedTuple):
    """A number of a row, with its standard error where the row has one."""

    value: str
    form: str = "{:.3f}"
    error: str | None = None

    def text(self, row: Row) -> str:
        if row[self.value] is None:
            return "not finite"
        numbers = [row[key] for key in (self.value, self.error) if key and row[key] is not None]
        return " ± ".join(map(self.form.format, numbers)).replace("%", " %")


class _Kind(NamedTuple):
    title: str
    measures: tuple[str, ...]
    columns: Mapping[str, _Column]
    asked: tuple[str, ...] = ()  # fields that are columns of their own


_KINDS = {
    "perplexity": _Kind(
        "Perplexity of texts",
        ("text", "prepared"),
        {
            "tokens": _Column("tokens", "{:,}"),
            "per token": _Column("perplexity"),
            "per byte": _Column("byte_perplexity"),
            "bits per byte": _Column("bits_per_byte"),
        },
    ),
    "choices": _Kind(
        "Multiple choice",
        ("choices",),
        {
            "accuracy": _Column("accuracy", "{:.1%}", "stderr"),
            "by length in bytes": _Column("accuracy_per_byte", "{:.1%}", "stderr_per_byte"),
            "random guess": _Column("chance", "{:.0%}"),
        },
    ),
    "answers": _Kind(
        "Generated answers",
        ("answers",),
        {
            "exact match": _Column("accuracy", "{:.1%}", "stderr"),
            "no result": _Column("no_result", "{:.0%}"),
            "at the token limit": _Column("cut", "{:.0%}"),
        },
    ),
    "harness": _Kind(
        "lm-evaluation-harness",
        ("lm_eval",),
        {"value": _Column("value", error="stderr")},
        ("task", "metric"),
    ),
}


def evaluation_tables(rows: Sequence[Row]) -> list[Table]:
    """Return a table for each kind of evaluation and each question set and options.

    Models are in order of their first rows; the newest row of a model counts.
    """
    tables = []
    for name, kind in _KINDS.items():
        conditions: dict[str, dict[tuple[str, ...], Row]] = {}
        for row in rows:
            if row.get("measure") in kind.measures:
                newest = conditions.setdefault(_conditions(row), {})
                model = name_of(row["run"] or {"model": row["model"]})
                key = (model, *(str(row[field]) for field in kind.asked))
                newest[key] = max(row, newest.get(key, row), key=lambda other: other["date"])
        for condition, newest in conditions.items():
            devices = dict.fromkeys(device_name(row["device"]) for row in newest.values())
            caption = "; ".join([condition, " and ".join(devices)])
            if any(column.error for column in kind.columns.values()):
                caption += "; ± is the standard error over questions"
            header = ("model", *kind.asked, *kind.columns)
            lines = _lines(kind, newest)
            tables.append(Table(name, kind.title, caption, header, lines))
    return tables


def _lines(kind: _Kind, newest: Mapping[tuple[str, ...], Row]) -> tuple[tuple[str, ...], ...]:
    """Models of the same name are told apart by six digits of their fingerprint."""
    names = {model: _model_name(row) for (model, *_), row in newest.items()}
    counts = Counter(names.values())
    return tuple(
        (
            names[model] if counts[names[model]] == 1 else f"{names[model]} ({model[:6]})",
            *asked,
            *(column.text(row) for column in kind.columns.values()),
        )
        for (model, *asked), row in newest.items()
    )


def _conditions(row: Row) -> str:
    """Return the data, their amount, and the options of an evaluation."""
    parts = [row["data"] if isinstance(row["data"], str) else ", ".join(row["data"])]
    if "questions" in row:
        parts.append(f"{row['questions']:,} questions")
    if "length" in row:
        parts.append(f"windows of {row['length']:,} with a stride of {row['stride']:,}")
    options = [
        f"{key} {value}"
        for key, value in row["options"].items()
        if key not in _NOT_SHOWN and value is not None
    ]
    return "; ".join(filter(None, [", ".join(parts), ", ".join(options)]))


def _model_name(row: Row) -> str:
    """Return the model; of a trained one its data, its sparsity and its seed."""
    if row["run"] is None:
        return str(row["model"])
    settings = row["run"]["settings"]
    sparsity = {
        path: tuple(v) if isinstance(v, list) else v
        for path, v in settings.items()
        if path.startswith("sparsity.")
    }
    dense = not any(value for path, value in sparsity.items() if "rate" in path)
    method = "dense" if dense else variant_name({**DEFAULTS, **sparsity}, DEFAULTS)
    return f"{', '.join(settings['data.sources'])}: {method}, seed {row['run']['seed']}"
