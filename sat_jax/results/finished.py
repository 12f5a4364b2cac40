"""Finished runs, read from work directories, folders of sweeps and files of rows."""

import dataclasses
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias

from sat_jax.config_values import find, keys, name_of
from sat_jax.errors import UserError
from sat_jax.results.record import SPARSE_ONLY, finished_row
from sat_jax.results.rows import Row, device_name, read
from sat_jax.results.sweep import Comparison
from sat_jax.train.files import read_json
from sat_jax.train.workdir import WorkDir

Settings: TypeAlias = Mapping[str, Any]

# The settings that committed rows have, some of which this version may lack, at their defaults.
_RECORDED = {
    "rate": 0.0, "rate_attention": None, "rate_mlp": None, "metric": "output", "aggregate": "sum",
    "selection": "topk", "temperature": 1.0, "schedule": "ladder", "rungs": 4, "dense_start": 0.0,
    "split": 0.5, "patience": 1, "min_gain": 0.005, "refresh_every": 10, "probe_tokens": 1024,
    "probe_sampling": "first", "stats_decay": 0.9, "attention_unit": "kv_group",
    "dense_layers": (), "layer_rates_attention": (), "layer_rates_mlp": (), "budget": None,
    "max_segments": 4, "block": 1, "balance": None, "rescale": False, "compensate": False,
    "dense_tokens": False, "forward": "kept", "dense_forward": False, "execution": "gather",
}  # fmt: skip
DEFAULTS: Settings = {
    **{f"sparsity.{name}": value for name, value in _RECORDED.items()},
    **{key.path: key.default for key in keys() if key.path.startswith("sparsity.")},
    **{path: find(path).default for path in SPARSE_ONLY},
}
"""The settings of sparsity, by dotted path, at their defaults."""


@dataclasses.dataclass(frozen=True)
class FinishedRun:
    """One finished run. `row` is what `scripts.train --record` writes."""

    row: Row

    @property
    def dense(self) -> bool:
        return bool(self.row["rate"] == 0)

    @property
    def steps(self) -> int:
        return int(self.row["steps"])

    @property
    def seed(self) -> int:
        return int(self.settings.get("seed", 0))

    @cached_property
    def settings(self) -> Settings:
        """Settings outside sparsity that differ from their defaults, by dotted path."""
        return {path: v for path, v in self.row["settings"].items() if path not in DEFAULTS}

    @cached_property
    def sparsity(self) -> Settings:
        """All settings of sparsity under their recorded names; the defaults for a dense run."""
        if self.dense:
            return DEFAULTS
        recorded = {f"sparsity.{name}": value for name, value in self.row["sparsity"].items()}
        outside = {path: v for path, v in self.row["settings"].items() if path in SPARSE_ONLY}
        values = {**DEFAULTS, **recorded, **outside}
        return {path: tuple(v) if isinstance(v, list) else v for path, v in values.items()}

    def shared(self, apart: Collection[str] = ()) -> str:
        """Return a fingerprint of everything but sparsity, seed, and the settings `apart`."""
        apart = {"seed", "data.sources", *apart}
        settings = {path: v for path, v in self.settings.items() if path not in apart}
        return f"{name_of(settings)} {self.row['data']}"

    @property
    def perplexity(self) -> float:
        """Held-out perplexity after training; infinite ones are stored as None."""
        after = self.row["perplexity_after"]
        return math.inf if after is None else float(after)

    @property
    def flops(self) -> float:
        """FLOPs of training, probes included."""
        return float(self.row["spent_flops"])

    @property
    def seconds(self) -> float:
        """Time of training, without set-up, compilation and evaluation."""
        parts = ("data", "step", "refresh", "checkpoint")
        return sum(self.row["seconds"][part] for part in parts)

    @property
    def place(self) -> tuple[str, str | None]:
        """Device and commit: times are comparable where both are equal."""
        return device_name(self.row["device"]), self.row["commit"]


def finished_runs(rows: Iterable[Row]) -> list[FinishedRun]:
    """Return the runs among rows, of those with the same settings and data the latest, in order of
    appearance. The oldest rows have no settings and are left out."""
    latest: dict[str, FinishedRun] = {}
    for run in (FinishedRun(row) for row in rows if "settings" in row):
        name = name_of({"shared": run.shared(), "seed": run.seed, **run.sparsity})
        if name not in latest or latest[name].row["date"] <= run.row["date"]:
            latest[name] = run
    return list(latest.values())


def collect(
    paths: Sequence[Path], log: Callable[[str], None]
) -> tuple[list[Row], list[Comparison]]:
    """Return the rows of runs and evaluations in `paths`: work directories of runs, folders of
    sweeps, and files of rows; and the comparisons of the sweeps.

    `log` receives a line for each unfinished run. Raises `UserError` for a path of another kind.
    """
    rows, comparisons = list[Row](), list[Comparison]()
    for path in paths:
        single = (path / "config.json").is_file()
        workdirs = [path] if single else [c.parent for c in sorted(path.glob("*/config.json"))]
        if not workdirs and not path.is_file():
            raise UserError(
                f"{path} is neither a run's work directory (config.json), nor a sweep's"
                " (*/config.json), nor a file of rows"
            )
        for workdir in map(WorkDir, workdirs):
            if workdir.summary.exists():
                rows.append(finished_row(workdir, path.name))
            else:
                log(f"{workdir.path} has not finished: left out")
        if path.is_file():
            rows += [row for row in read(path) if "settings" in row or "measure" in row]
        if (path / "sweep.json").is_file():
            for table in read_json(path / "sweep.json")["comparisons"]:
                settings = tuple(table["settings"])
                comparisons.append(Comparison(table["name"], table["title"], settings))
    return rows, comparisons
