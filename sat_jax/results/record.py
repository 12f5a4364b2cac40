"""Finished runs as committed rows, and the dense baseline of a run.

The dense baseline is the run of the same settings, seed and data without sparsity. A row stores the
fingerprint that the two share as `twin`.
"""

import dataclasses
import datetime
import json
import math
import operator
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sat_jax.config import Config
from sat_jax.config_sparsity import SparsityConfig
from sat_jax.config_values import changed, find, from_config_dict, keys, name_of, without_free
from sat_jax.results.rows import ORIGIN, Row, append, latest, read
from sat_jax.train.files import read_json
from sat_jax.train.metrics import read_metrics
from sat_jax.train.workdir import WorkDir

_COPIED = (
    *("steps", "tokens", "loss_tokens", "perplexity_before", "perplexity_after", "spent_flops"),
    *("dense_flops", "rungs", "selections", "probes", "seconds", "compile_seconds", "peak_memory"),
    "data",
)
_POINTS = 16  # of a curve

SPARSE_ONLY = ("optimizer.moments", "model.kernels")
"""Settings outside `Config.sparsity` that have an effect only with sparsity."""


def dense_version(config: Config) -> Config:
    """Return the same run without sparsity, and without the settings that need it."""
    parts: dict[str, Any] = {"sparsity": SparsityConfig()}
    for path in SPARSE_ONLY:
        group, _, name = path.partition(".")
        part = parts.get(group, getattr(config, group))
        parts[group] = dataclasses.replace(part, **{name: find(path).default})
    return dataclasses.replace(config, **parts)


def dense_baseline(config: Config) -> str:
    """Return a fingerprint that a run shares with its dense baseline."""
    values = changed(without_free(dense_version(config)))
    # Prepared data have a fingerprint of their content; the place of the sources is irrelevant.
    return name_of({key: value for key, value in values.items() if key != "data.sources"})


def finished_row(workdir: WorkDir, experiment: str) -> Row:
    """Return the finished run of a work directory as a row, with the date (UTC) of its end."""
    config = from_config_dict(read_json(workdir.config))
    row = row_of(experiment, config, read_json(workdir.summary), read_metrics(workdir.metrics))
    ended = datetime.datetime.fromtimestamp(workdir.summary.stat().st_mtime, datetime.UTC)
    return row | {"date": ended.isoformat(timespec="seconds")}


def row_of(
    experiment: str,
    config: Config,
    summary: Mapping[str, Any],
    records: Sequence[Mapping[str, Any]],
) -> Row:
    """Return a finished run as a row with the origin of the run, but no date.

    `summary` is its `summary.json`, `records` its `metrics.jsonl`.
    """
    row = {name: summary[name] for name in _COPIED}
    row |= {"experiment": experiment, "twin": dense_baseline(config), "rate": config.omitted_share}
    every = changed(config)
    settings = changed(without_free(dense_version(config)))
    settings |= {path: every[path] for path in SPARSE_ONLY if path in every}
    row["settings"] = {key: without_place(value, key) for key, value in settings.items()}
    prefix = "sparsity."
    paths = [key.path for key in keys() if key.path.startswith(prefix)]
    row["sparsity"] = {
        path.removeprefix(prefix): without_place(operator.attrgetter(path)(config), path)
        for path in paths
    }
    row["curve"] = curve_of(records)
    row |= {name: summary[name] for name in ORIGIN}
    plain: Row = json.loads(json.dumps(row))  # tuples become lists
    return plain


def curve_of(records: Sequence[Mapping[str, Any]]) -> dict[str, list[float | None]]:
    """Return at most 16 points of a run: the tokens up to each, and the mean training loss (under
    masks, five digits) since the previous one, None if it is not finite. Of a run with evaluations
    between start and end also the tokens before each evaluation and its loss."""
    steps = [record for record in records if record.get("loss") is not None]
    blocks = [block for block in np.array_split(np.arange(len(steps)), _POINTS) if len(block)]
    losses = [np.mean([steps[index]["loss"] for index in block]) for block in blocks]
    curve = {
        "tokens": [steps[block[-1]]["tokens"] for block in blocks],
        "loss": list(map(_five_digits, losses)),
    }
    evaluated = [r for r in records if r.get("eval_loss") is not None and "tokens" in r]
    if len(evaluated) > 2:
        curve["eval_tokens"] = [record["tokens"] for record in evaluated]
        curve["eval_loss"] = [_five_digits(record["eval_loss"]) for record in evaluated]
    return curve


def _five_digits(loss: float) -> float | None:
    return float(f"{loss:.5g}") if math.isfinite(loss) else None


def record_run(file: Path, row: Row) -> None:
    """Append a row of `row_of` to `file`, with the date of today, unless `file` has it already."""
    fields = {name: value for name, value in row.items() if name not in ("date", *ORIGIN)}
    if not file.exists() or latest(read(file), **fields) is None:
        append(file, [fields], {name: row[name] for name in ORIGIN})


def without_place(value: Any, key: str) -> Any:
    """Replace absolute paths by their last part, so that rows name no machine.

    Six digits of a fingerprint tell apart equal names; data sources need none, since prepared data
    have a fingerprint of their own.
    """
    if isinstance(value, list | tuple):
        return [without_place(part, key) for part in value]
    if not (isinstance(value, str) and Path(value).is_absolute()):
        return value
    name = Path(value).name
    return name if key == "data.sources" else f"{name}#{name_of({'path': value})[:6]}"


def dense_reference(file: Path, config: Config, data: str) -> float | None:
    """Return the final held-out perplexity of a run's dense baseline on the same prepared data.

    Searches the rows of `file`; None if it is not there, and for a dense run.
    """
    if not file.exists() or config.omitted_share == 0:
        return None
    row = latest(read(file), twin=dense_baseline(config), data=data, rate=0.0)
    return None if row is None else row["perplexity_after"]
