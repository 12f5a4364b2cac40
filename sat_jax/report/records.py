"""A run as a report sees it, whether it comes from a work directory or from a committed row."""

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

from sat_jax.analysis.curves import training_seconds
from sat_jax.analysis.results import OF_SPARSITY
from sat_jax.analysis.rows import ORIGIN
from sat_jax.analysis.twins import device_name
from sat_jax.config import SparsityConfig
from sat_jax.config_values import find, name_of
from sat_jax.errors import UserError

Settings: TypeAlias = Mapping[str, Any]

_BESIDE = {path.rpartition(".")[2]: path for path in OF_SPARSITY}  # by the short name
_REMOVED = {"aggregate": "sum", "budget": None, "rescale": False, "dense_tokens": False}
"""Defaults of settings of sparsity up to commit 09323b3, which older rows have."""
SPARSE = (
    {name: find(path).default for name, path in _BESIDE.items()}
    | dataclasses.asdict(SparsityConfig())
    | _REMOVED
)
"""What runs of one comparison differ in besides their seed, at its defaults."""

_NEEDED = (
    *("experiment", "twin", "rate", "sparsity", "steps", "tokens", "perplexity_before"),
    *("perplexity_after", "spent_flops", "dense_flops", "rungs", "seconds", "peak_memory", "data"),
    *("date", *ORIGIN),
)
_APART = ("seed", "data.sources", *OF_SPARSITY)  # no part of what runs have in common


@dataclasses.dataclass(frozen=True)
class Record:
    """One finished run. `row` is what `scripts.train --record` writes; `place` is its work
    directory, where that is at hand."""

    row: Mapping[str, Any]
    place: Path | None = None

    @property
    def dense(self) -> bool:
        """Whether no sparsity was asked for."""
        return bool(self.row["rate"] == 0)

    @property
    def settings(self) -> Settings:
        """What is not at its default, but for sparsity. Rows that were written before these were
        kept have none."""
        settings: Settings = self.row.get("settings", {})
        return settings

    @property
    def seed(self) -> int:
        return int(self.settings.get("seed", 0))

    @property
    def sparse(self) -> dict[str, Any]:
        """Every setting of sparsity, those that are elsewhere too; of a dense run none."""
        if self.dense:
            return {}
        beside = {name: self.settings.get(path, SPARSE[name]) for name, path in _BESIDE.items()}
        values = {**SPARSE, **self.row["sparsity"], **beside}
        return {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}

    @property
    def base(self) -> str:
        """A name for all but sparsity and seed: runs that share it can be compared. A row without
        settings has its seed in it."""
        if "settings" not in self.row:
            return f"{self.row['twin']} {self.row['data']}"
        return self._shared_but(_APART)

    @property
    def series(self) -> str:
        """A name for what `base` names and runs of other lengths share with it."""
        return self._shared_but((*_APART, "train.steps")) if "settings" in self.row else self.base

    def _shared_but(self, apart: tuple[str, ...]) -> str:
        common = {k: v for k, v in self.settings.items() if k not in apart}
        return f"{name_of(common)} {self.row['data']}"

    @property
    def fine_tuned(self) -> bool:
        """Whether only answers bore loss."""
        return self.settings.get("data.format", "text") != "text"

    @property
    def seconds(self) -> float:
        """Of training: compiling and evaluating are apart."""
        return training_seconds(self.row["seconds"])

    @property
    def device(self) -> str:
        """In words, as `device_name` has it."""
        return device_name(self.row["device"])

    @property
    def commit(self) -> str:
        """The first ten digits; `-dirty` where files differed from it."""
        digits, dirty, _ = (self.row["commit"] or "unknown").partition("-dirty")
        return f"{digits[:10]}{dirty}"


def record_of(row: Mapping[str, Any], place: Path | None = None, origin: str = "") -> Record:
    """Raises `UserError`, naming `origin`, for a row that is no run's."""
    if missing := [name for name in _NEEDED if name not in row]:
        raise UserError(f"{origin}: a run's row has {', '.join(missing)} too")
    return Record(row, place)


def newest(records: Iterable[Record]) -> list[Record]:
    """Of runs with the same settings and data the one of the latest date, in order of first
    appearance."""
    latest: dict[str, Record] = {}
    for record in records:
        name = name_of({"base": record.base, "seed": record.seed, **record.sparse})
        if name not in latest or latest[name].row["date"] <= record.row["date"]:
            latest[name] = record
    return list(latest.values())
