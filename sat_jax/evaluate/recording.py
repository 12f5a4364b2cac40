"""Evaluations as rows of results: what was evaluated, on what, and what came out."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sat_jax.config import Config
from sat_jax.config_values import changed, without_free
from sat_jax.results.record import dense_baseline, without_place
from sat_jax.train.metrics import to_json


def evaluation_row(
    measure: str,
    model: str,
    data: Any,
    options: Mapping[str, Any],
    figures: Mapping[str, Any],
    config: Config | None,
) -> dict[str, Any]:
    """One model's figures by one measure (`text`, `choices`, ...), short of where they were made.

    `config`: the settings of the run that `model` is the work directory of. The row names no place,
    as a run's own.
    """
    row = {"measure": measure, "model": model, "data": data, "options": dict(options)}
    run = None
    if config is not None:
        settings = changed(without_free(config))
        run = {"seed": config.seed, "twin": dense_baseline(config), "settings": settings}
    return to_json({**_placeless({**row, "run": run}), **figures})


def _placeless(value: Any, key: str = "") -> Any:
    match value:
        case Mapping():
            return {name: _placeless(part, name) for name, part in value.items()}
        case list() | tuple():
            return [_placeless(part, key) for part in value]
        case Path():
            value = str(value)
    # What was evaluated on is named by its file alone, as what was trained on.
    return without_place(value, "data.sources" if key == "data" else key)
