"""Tables of evaluations: rows of `scripts.evaluate --record`."""

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeAlias

from sat_jax.config_values import name_of
from sat_jax.results.finished import DEFAULTS
from sat_jax.results.rows import Row, device_names
from sat_jax.results.tables import Table
from sat_jax.results.variants import variant_name

_Column: TypeAlias = tuple[str, ...]

_NOT_SHOWN = (
    "generations",
    "rows",
    "length",
    "context",
    "stride",
    "rope_type",
    "rope_factor",
)  # options without effect, or shown anyway
# Name and title of each table, the measures of its rows, and its columns: heading, format, and the
# field of a number, followed by that of its standard error if it has one.
_TABLES: tuple[tuple[str, str, tuple[str, ...], tuple[_Column, ...]], ...] = (
    ("perplexity", "Perplexity of texts", ("text", "prepared"), (
        ("tokens", "{:,}", "tokens"),
        ("per token", "{:.3f}", "perplexity"),
        ("per byte", "{:.3f}", "byte_perplexity"),
        ("bits per byte", "{:.3f}", "bits_per_byte"),
    )),
    ("context", "Perplexity against context length", ("context",), (
        ("context", "{:,}", "context"),
        ("documents", "{:,}", "documents"),
        ("tokens", "{:,}", "tokens"),
        ("per token", "{:.3f}", "perplexity"),
        ("mean over windows", "{:.3f}", "window_perplexity"),
    )),
    ("passkey", "Passkey retrieval", ("passkey",), (
        ("tokens", "{:,}", "context"),
        ("prompts", "{:,}", "prompts"),
        ("exact match", "{:.1%}", "accuracy", "stderr"),
    )),
    ("choices", "Multiple choice", ("choices",), (
        ("accuracy", "{:.1%}", "accuracy", "stderr"),
        ("by length in bytes", "{:.1%}", "accuracy_per_byte", "stderr_per_byte"),
        ("random guess", "{:.0%}", "chance"),
    )),
    ("answers", "Generated answers", ("answers",), (
        ("exact match", "{:.1%}", "accuracy", "stderr"),
        ("no result", "{:.0%}", "no_result"),
        ("at the token limit", "{:.0%}", "cut"),
    )),
    ("harness", "lm-evaluation-harness", ("lm_eval",), (
        ("task", "{}", "task"),
        ("metric", "{}", "metric"),
        ("value", "{:.3f}", "value", "stderr"),
    )),
)  # fmt: skip


def evaluation_tables(rows: Sequence[Row]) -> list[Table]:
    """Return a table for each kind of evaluation and each question set and options.

    Models are in order of their first rows; the newest row of a model counts.
    """
    tables = []
    for name, title, measures, columns in _TABLES:
        for setting, lines in newest_rows(rows, measures):
            caption = f"{setting}; {device_names(row for _, row in lines)}"
            if any(len(column) > 3 for column in columns):
                caption += "; ± is the standard error over questions"
            cells = [(name, *(_cell(row, column) for column in columns)) for name, row in lines]
            header = ("model", *(column[0] for column in columns))
            tables.append(Table(name, title, caption, header, tuple(cells)))
    return tables


def newest_rows(
    rows: Sequence[Row], measures: Sequence[str]
) -> Iterator[tuple[str, list[tuple[str, Row]]]]:
    """Yield each question set with its options, as text, and its rows with the names of the models.

    Models are in order of their first rows. Of a model's rows of one task or context length, the
    newest counts.
    """
    settings = defaultdict[str, dict[Any, Row]](dict)
    for row in rows:
        if row.get("measure") in measures:
            newest = settings[_setting(row)]
            key = (_model(row), row.get("task"), row.get("metric"), row.get("context"))
            newest[key] = max(row, newest.get(key, row), key=lambda other: other["date"])
    for setting, newest in settings.items():
        names = _names({model: row for (model, *_), row in newest.items()})
        yield setting, [(names[model], row) for (model, *_), row in newest.items()]


def _cell(row: Row, column: _Column) -> str:
    _, form, field, *error = column
    if row[field] is None:
        return "not finite"
    numbers = [row[name] for name in (field, *error) if row[name] is not None]
    return " ± ".join(map(form.format, numbers)).replace("%", " %")


def _model(row: Row) -> str:
    model = row["run"] or {"model": row["model"]}
    extension = extension_of(row)
    return name_of(model if extension is None else {**model, "extension": extension})


def extension_of(row: Row) -> tuple[str, float] | None:
    """Return the scaling of rotary positions for a longer context and its factor, that of the
    evaluation or else of the run; None without one."""
    options, settings = row["options"], row["run"]["settings"] if row["run"] else {}
    if options.get("rope_type") is not None:
        return options["rope_type"], options.get("rope_factor") or 1.0
    if "model.rope_type" in settings:
        return settings["model.rope_type"], settings.get("model.rope_factor", 1.0)
    return None


def _names(rows: Mapping[str, Row]) -> dict[str, str]:
    """Return names by fingerprint; six digits of it tell apart models of the same name."""
    names = {model: _model_name(row) for model, row in rows.items()}
    counts = Counter(names.values())
    return {m: name if counts[name] == 1 else f"{name} ({m[:6]})" for m, name in names.items()}


def _model_name(row: Row) -> str:
    """Return the model and its extension; of a trained one its data, its sparsity and its seed."""
    scaling = "" if (extension := extension_of(row)) is None else ", {} × {:g}".format(*extension)
    if row["run"] is None:
        return f"{row['model']}{scaling}"
    settings = row["run"]["settings"]
    sparsity = {
        path: tuple(v) if isinstance(v, list) else v
        for path, v in settings.items()
        if path.startswith("sparsity.")
    }
    dense = not any(value for path, value in sparsity.items() if "rate" in path)
    method = "dense" if dense else variant_name({**DEFAULTS, **sparsity}, DEFAULTS)
    data = ", ".join(settings["data.sources"])
    return f"{data}: {method}{scaling}, seed {row['run']['seed']}"


def _setting(row: Row) -> str:
    """Return the data, their amount, and the options of an evaluation."""
    parts = [row["data"] if isinstance(row["data"], str) else ", ".join(row["data"])]
    if "questions" in row:
        parts.append(f"{row['questions']:,} questions")
    if row["measure"] == "context":
        parts.append(f"windows that advance by {row['stride']:,} tokens")
    if "length" in row:
        parts.append(f"windows of {row['length']:,} with a stride of {row['stride']:,}")
    shown = {k: v for k, v in row["options"].items() if k not in _NOT_SHOWN and v is not None}
    options = ", ".join(f"{key} {value}" for key, value in shown.items())
    return "; ".join(filter(None, [", ".join(parts), options]))
