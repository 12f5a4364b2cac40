"""Which runs are held against each other, and what is measured of them."""

import dataclasses
from collections.abc import Callable, Iterable, Sequence

from sat_jax.analysis.tables import (
    dense_speed,
    first_rung,
    first_rung_speedup,
    is_measured,
)
from sat_jax.analysis.twins import RunData, Speedups, gaps, whole_runs
from sat_jax.config_values import name_of
from sat_jax.report.records import Record, Settings


@dataclasses.dataclass(frozen=True)
class Variant:
    """Runs that differ in their seed alone, in its order, each with the dense run of its seed where
    there is one. `settings` are those of sparsity; a dense variant has none."""

    settings: Settings
    runs: tuple[Record, ...]
    twins: tuple[Record | None, ...]

    @property
    def dense(self) -> bool:
        return self.runs[0].dense

    def over(self, measure: Callable[[Record], float | None]) -> list[float | None]:
        """`measure` of each run."""
        return [measure(run) for run in self.runs]

    @property
    def _rows(self) -> tuple[list[RunData], list[RunData | None]]:
        """Of the runs and of their twins."""
        return [run.row for run in self.runs], [twin.row if twin else None for twin in self.twins]

    def gaps(self) -> list[float | None]:
        """Perplexity against the dense run of the same seed, per cent: paired differences, of the
        pairs that there are."""
        return [] if self.dense else gaps(*self._rows)

    def speedups(self) -> Speedups:
        """Of the whole runs, as `whole_runs` has them."""
        return whole_runs(*self._rows)


@dataclasses.dataclass(frozen=True)
class Group:
    """Runs that differ in sparsity and seed alone."""

    dense: Variant | None
    sparse: tuple[Variant, ...]

    @property
    def variants(self) -> tuple[Variant, ...]:
        """The dense one first."""
        return (*([self.dense] if self.dense else []), *self.sparse)

    @property
    def runs(self) -> list[Record]:
        return [run for variant in self.variants for run in variant.runs]


def make_groups(records: Iterable[Record]) -> list[Group]:
    """Groups in order of their first run, variants too; each run at most once (`newest`)."""
    bases: dict[str, list[Record]] = {}
    for record in records:
        bases.setdefault(record.base, []).append(record)
    return [_group(members) for members in bases.values()]


def _group(members: Sequence[Record]) -> Group:
    dense = {record.seed: record for record in members if record.dense}
    together: dict[str, list[Record]] = {}
    for record in members:
        together.setdefault(name_of(record.sparse), []).append(record)
    variants = []
    for runs in together.values():
        runs = sorted(runs, key=lambda run: run.seed)
        twins = tuple(dense.get(run.seed) for run in runs)
        variants.append(Variant(runs[0].sparse, tuple(runs), twins))
    return Group(
        next((one for one in variants if one.dense), None),
        tuple(one for one in variants if not one.dense),
    )


def first_rungs(variant: Variant) -> list[float | None]:
    """Speed of the first rung that omits anything, over the run's own dense rung; where a run has
    none, over its twin's on the same device."""
    values = []
    for run, twin in zip(variant.runs, variant.twins, strict=True):
        near = twin if twin is not None and twin.device == run.device else None
        reference = None if near is None else dense_speed(near.row["rungs"])
        values.append(first_rung_speedup(run.row["rungs"], reference))
    return values


def first_bound(run: Record) -> float | None:
    """FLOPs of a dense step ÷ those of that rung."""
    rung = first_rung(run.row["rungs"])
    return None if rung is None else rung["bound"]


def whole_bound(run: Record) -> float:
    """FLOPs of the same tokens, dense ÷ FLOPs spent, probes in."""
    return float(run.row["dense_flops"] / run.row["spent_flops"])


def first_speed(run: Record) -> float | None:
    """Tokens a second, median, of the first rung that omits anything; of a dense run its own."""
    rung = first_rung(run.row["rungs"]) or run.row["rungs"][0]
    return rung["tokens_per_second"] if is_measured(rung) else None
