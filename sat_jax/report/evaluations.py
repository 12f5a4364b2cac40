"""Tables of evaluations on questions: rows of `scripts.evaluate --record`, not of runs."""

from collections.abc import Sequence
from typing import Any

from sat_jax.analysis.tables import markdown, percent, sides
from sat_jax.config_values import name_of
from sat_jax.errors import UserError
from sat_jax.report.records import SPARSE, Record
from sat_jax.report.wording import named, rate_of

Row = dict[str, Any]
_ASIDE = ("generations", "rows")  # options of how it was done, not of what
_RATES = ("rate", "rate_attention", "rate_mlp", "layer_rates_attention", "layer_rates_mlp")


def answers(rows: Sequence[Row]) -> str:
    """Exact match of generated answers, a table for each set of questions."""

    def line(row: Row) -> list[str]:
        return [_score(row, "accuracy", "stderr"), percent(row["no_result"]), percent(row["cut"])]

    return _by_questions(rows, "answers", ("exact match", "no result", "cut short"), line)


def choices(rows: Sequence[Row]) -> str:
    """Multiple choice, a table for each set of questions."""

    def line(row: Row) -> list[str]:
        per_byte = _score(row, "accuracy_per_byte", "stderr_per_byte")
        return [_score(row, "accuracy", "stderr"), per_byte, percent(row["chance"])]

    return _by_questions(rows, "choices", ("accuracy", "per byte", "by chance"), line)


def _by_questions(rows: Sequence[Row], measure: str, titles: Sequence[str], line: Any) -> str:
    """Models in the order of their first rows; of a model the newest row counts."""
    asked: dict[str, dict[str, Row]] = {}
    for row in rows:
        if row.get("measure") == measure:
            # Figures compare where the same is asked in the same way.
            same = asked.setdefault(f"{row['data']} {_told(row)}", {})
            same[name_of(row["run"] or {"model": row["model"]})] = row
    if not asked:
        raise UserError(f"no evaluation by {measure} among the rows")
    parts = []
    for models in asked.values():
        names = [_name(row) for row in models.values()]
        body = [
            [name if names.count(name) == 1 else f"{name} ({key[:6]})", *line(row)]
            for name, (key, row) in zip(names, models.items(), strict=True)
        ]
        parts.append(markdown(("model", *titles), body, sides(1, len(titles))))
        row = next(iter(models.values()))
        parts.append(
            f"{row['data']}, {row['questions']:,} questions; {_told(row)}; {Record(row).device}."
            " ± is the standard error over questions."
        )
    return "\n\n".join(parts)


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


def _score(row: Row, value: str, error: str) -> str:
    """With its standard error, which one question alone does not have."""
    score = f"{100 * row[value]:.1f} %"
    return score if row[error] is None else f"{score} ± {100 * row[error]:.1f} %"


TABLES = {"answers": answers, "choices": choices}
