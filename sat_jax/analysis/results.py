"""Runs as committed rows, and the dense run that a sparse one is held against."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sat_jax.analysis.curves import curve_of
from sat_jax.analysis.rows import ORIGIN, append, latest, read
from sat_jax.config import Config, SparsityConfig
from sat_jax.config_values import changed, find, name_of, without_free

_KEPT = (
    "steps",
    "tokens",
    "loss_tokens",
    "perplexity_before",
    "perplexity_after",
    "spent_flops",
    "dense_flops",
    "rungs",
    "selections",
    "probes",
    "seconds",
    "compile_seconds",
    "peak_memory",
    "data",
)


OF_SPARSITY = ("optimizer.moments", "optimizer.bias_correction", "model.kernels")
"""Settings that matter only with sparsity and are none of `Config.sparsity`."""


def dense_version(config: Config) -> Config:
    """The same run without sparsity, and without what matters only with it."""
    parts: dict[str, Any] = {"sparsity": SparsityConfig()}
    for path in OF_SPARSITY:
        group, _, name = path.partition(".")
        part = parts.get(group, getattr(config, group))
        parts[group] = dataclasses.replace(part, **{name: find(path).default})
    return dataclasses.replace(config, **parts)


def dense_twin(config: Config) -> str:
    """A name for everything of a run but its sparsity and what no result depends on: runs that
    share it differ in sparsity alone."""
    values = changed(without_free(dense_version(config)))
    # Prepared data has a name of its own, of its content; where it lies says nothing.
    return name_of({key: value for key, value in values.items() if key != "data.sources"})


def row_of(
    experiment: str,
    config: Config,
    summary: Mapping[str, Any],
    records: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """A finished run as one row, short of where it was: `summary` is its `summary.json`, `records`
    its `metrics.jsonl`, of which the row keeps a thinned curve."""
    row = {name: summary[name] for name in _KEPT}
    names = {"experiment": experiment, "twin": dense_twin(config), "rate": max(config.rates)}
    own = changed(config)
    settings = changed(without_free(dense_version(config)))
    settings |= {path: own[path] for path in OF_SPARSITY if path in own}
    settings = {key: without_place(value, key) for key, value in settings.items()}
    row |= names | {"settings": settings, "sparsity": dataclasses.asdict(config.sparsity)}
    if "prepared" in summary:  # older versions wrote none
        row["prepared"] = _of_data(summary["prepared"])
    row["curve"] = curve_of(records, summary)
    plain: dict[str, Any] = json.loads(json.dumps(row))  # tuples become lists
    return plain


def _of_data(prepared: Mapping[str, Any]) -> dict[str, Any]:
    """Of `PreparedInfo` what says how much of it was trained on: the share of the training rows'
    slots that is no padding, and of documents or examples in both splits how many there are, those
    left out by why, and those longer than a row, of which text goes on in the next one."""
    splits, form = prepared["splits"], prepared["form"]
    return {
        "useful_share": splits["train"]["useful_share"],
        "documents": sum(split["documents"] for split in splits.values()),
        "left_out": prepared["left_out"],
        "long_documents": sum(split["long_documents"] for split in splits.values()),
        "too_long": "cut" if form["format"] == "text" else form["too_long"],
    }


def record_run(
    file: Path,
    experiment: str,
    config: Config,
    summary: Mapping[str, Any],
    records: Sequence[Mapping[str, Any]],
) -> None:
    """Appends a finished run to `file` as `row_of` gives it, unless it is there; it comes from
    where the run was, which may be another machine than this."""
    row = row_of(experiment, config, summary, records)
    if not file.exists() or latest(read(file), **row) is None:
        append(file, [row], {name: summary[name] for name in ORIGIN})


def without_place(value: Any, key: str) -> Any:
    """Of absolute paths the last part, since rows speak of no machine, and six digits of the whole,
    which tell apart what is called the same elsewhere. Sources need none: data has its own name."""
    if isinstance(value, list):
        return [without_place(part, key) for part in value]
    if not (isinstance(value, str) and Path(value).is_absolute()):
        return value
    name = Path(value).name
    return name if key == "data.sources" else f"{name}#{name_of({'path': value})[:6]}"


def dense_reference(file: Path, config: Config, data: str) -> float | None:
    """Held-out perplexity after the dense twin of a run on the same prepared data, from the
    committed rows; None where it has not been measured, and for a dense run itself."""
    if not file.exists() or max(config.rates) == 0:
        return None
    row = latest(read(file), twin=dense_twin(config), data=data, rate=0.0)
    if row is None:
        return None
    perplexity = row["perplexity_after"]
    assert isinstance(perplexity, float)
    return perplexity
