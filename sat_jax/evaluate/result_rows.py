"""Rows of results for evaluations: model, data, options and figures."""

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
    """Return the row of one model and one measure (`text`, `choices`, ...), without provenance.

    `config`: the settings of the run, if `model` is the work directory of a run. As in the rows of
    runs, paths are replaced by names that do not depend on the machine.
    """
    row = {"measure": measure, "model": model, "data": data, "options": dict(options)}
    run = None
    if config is not None:
        settings = changed(without_free(config))
        run = {"seed": config.seed, "twin": dense_baseline(config), "settings": settings}
    return to_json({**_without_paths({**row, "run": run}), **figures})


def _without_paths(value: Any, key: str = "") -> Any:
    match value:
        case Mapping():
            return {name: _without_paths(item, name) for name, item in value.items()}
        case list() | tuple():
            return [_without_paths(item, key) for item in value]
        case Path():
            value = str(value)
    # Evaluation data are named by the file name alone, like training data.
    return without_place(value, "data.sources" if key == "data" else key)
