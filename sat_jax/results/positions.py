"""Perplexity by position in the row, of models trained from scratch: means over seeds, by text."""

import collections
from collections.abc import Mapping, Sequence
from typing import Any

from sat_jax.config_values import find
from sat_jax.results.finished import DEFAULTS
from sat_jax.results.rows import Row, device_names
from sat_jax.results.tables import Table
from sat_jax.results.variants import mean_of, variant_name

_SHOWN = (0, 1, 3, 7, 15)  # of the equal parts of a window: positions that double


def position_tables(rows: Sequence[Row]) -> list[Table]:
    """Return a table for each text on which `scripts.evaluate --context` evaluated models with a
    preset, in windows as long as the rows of their training: a line for each model, method and
    number of steps."""
    texts: dict[tuple[Any, ...], dict[str, dict[int, Row]]] = collections.defaultdict(dict)
    for row in rows:
        if row.get("measure") != "context" or row["run"] is None or row["options"].get("rope_type"):
            continue
        settings = row["run"]["settings"]
        if "model.preset" in settings and row["context"] == _value(settings, "data.row_length"):
            text = (*row["data"], row["context"], row["stride"], row["tokens"])
            texts[text].setdefault(_name(settings), {})[row["run"]["seed"]] = row
    return [_table(models) for models in texts.values()]


def _table(models: Mapping[str, Mapping[int, Row]]) -> Table:
    row = next(iter(next(iter(models.values())).values()))
    context, parts = row["context"], len(row["position_perplexity"])
    shown = [part for part in _SHOWN if part < parts]
    ends = [(context * part // parts + 1, context * (part + 1) // parts) for part in shown]
    body = []
    for name, by_seed in models.items():
        columns = [
            [r["perplexity"] for r in by_seed.values()],
            *([r["position_perplexity"][part] for r in by_seed.values()] for part in shown),
        ]
        means = [mean_of(column) for column in columns]
        texts = (mean.text("{:.1f}".format) if mean else "-" for mean in means)
        body.append((name, str(len(by_seed)), *texts))
    measured = [r for by_seed in models.values() for r in by_seed.values()]
    caption = (
        f"{', '.join(row['data'])}: {row['tokens']:,} tokens, windows of {context:,} that advance"
        f" by {row['stride']:,}; mean and standard error over seeds; {device_names(measured)}"
    )
    header = ("model", "seeds", "perplexity", *(f"positions {a:,} to {b:,}" for a, b in ends))
    return Table("positions", "Perplexity by position", caption, header, tuple(body))


def _name(settings: Mapping[str, Any]) -> str:
    sparsity = {
        path: tuple(value) if isinstance(value, list) else value
        for path, value in settings.items()
        if path.startswith("sparsity.")
    }
    method = variant_name({**DEFAULTS, **sparsity}, DEFAULTS) if sparsity else "dense"
    width = f" of width {settings['model.d_model']}" if "model.d_model" in settings else ""
    steps = _value(settings, "train.steps")
    return f"{settings['model.preset']}{width}: {method}, {steps:,} steps"


def _value(settings: Mapping[str, Any], path: str) -> Any:
    return settings.get(path, find(path).default)
