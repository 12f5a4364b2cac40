"""Which runs are held against each other, and what is measured of them."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence

from sat_jax.analysis.tables import (
    dense_speed,
    first_rung,
    first_rung_speedup,
    is_measured,
)
from sat_jax.analysis.twins import RunData, Speedups, gap_at_equal_flops, gaps, whole_runs
from sat_jax.config_values import name_of
from sat_jax.report.records import Record, Settings


@dataclasses.dataclass(frozen=True)
class Variant:
    """Runs that differ in their seed alone, in its order, each with the dense run of its seed where
    there is one, which is of the same tokens for a sparse one, and for a dense one of more.
    `settings` are those of sparsity; a dense variant has none. `lengths`: the dense runs of each
    run's seed of all lengths. `steps`: of the runs that the group compares."""

    settings: Settings
    runs: tuple[Record, ...]
    twins: tuple[Record | None, ...]
    lengths: tuple[tuple[Record, ...], ...]
    steps: int

    @property
    def dense(self) -> bool:
        return self.runs[0].dense

    @property
    def reference(self) -> bool:
        """Whether the others of the group are held against this one."""
        return self.dense and self.runs[0].row["steps"] == self.steps

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
        return gaps(*self._rows)

    def gaps_at_equal_flops(self) -> list[float | None]:
        """Perplexity against dense training of the same seed that ended after as many FLOPs, per
        cent, of those runs that two or more lengths of it are known for."""
        return [
            gap
            for run, dense in zip(self.runs, self.lengths, strict=True)
            if len(dense) > 1
            and (gap := gap_at_equal_flops(run.row, [one.row for one in dense])) is not None
        ]

    def speedups(self) -> Speedups:
        """Of the whole runs, as `whole_runs` has them; without estimates of dense ones, whose own
        rung says nothing of a longer run."""
        found = whole_runs(*self._rows)
        if self.dense and found.estimated:
            return found._replace(values=[None] * len(self.runs))
        return found


@dataclasses.dataclass(frozen=True)
class Group:
    """Runs that differ in sparsity and seed alone; and, longest first, the dense ones that differ
    from those in having fewer steps, `shorter`."""

    dense: Variant | None
    sparse: tuple[Variant, ...]
    shorter: tuple[Variant, ...] = ()

    @property
    def variants(self) -> tuple[Variant, ...]:
        """The dense one first."""
        return (*([self.dense] if self.dense else []), *self.sparse)

    @property
    def runs(self) -> list[Record]:
        """All of the same length."""
        return [run for variant in self.variants for run in variant.runs]

    @property
    def all_runs(self) -> list[Record]:
        """The shorter ones too."""
        return self.runs + [run for variant in self.shorter for run in variant.runs]


def make_groups(records: Iterable[Record]) -> list[Group]:
    """Groups in order of their first run, variants too; each run at most once (`newest`). Dense
    runs that are the shorter ones of a group make none of their own."""
    bases: dict[str, list[Record]] = {}
    series: dict[str, list[Record]] = {}
    for record in records:
        bases.setdefault(record.base, []).append(record)
        if record.dense:
            series.setdefault(record.series, []).append(record)
    groups = [_group(runs, series.get(runs[0].series, ())) for runs in bases.values()]
    shorter = {id(run) for group in groups for one in group.shorter for run in one.runs}
    return [
        group
        for group in groups
        if group.sparse or not all(id(run) in shorter for run in group.runs)
    ]


def _group(members: Sequence[Record], series: Sequence[Record]) -> Group:
    """`series`: the dense runs of all lengths that share the rest with `members`."""
    dense = {record.seed: record for record in members if record.dense}
    steps: int = members[0].row["steps"]

    def variant(runs: Sequence[Record], of_tokens: Mapping[int, Record]) -> Variant:
        ordered = tuple(sorted(runs, key=lambda run: run.seed))
        lengths = tuple(tuple(o for o in series if o.seed == run.seed) for run in ordered)
        twins = tuple(of_tokens.get(run.seed) for run in ordered)
        return Variant(ordered[0].sparse, ordered, twins, lengths, steps)

    sparse: dict[str, list[Record]] = {}
    shorter: dict[int, list[Record]] = {}
    for record in members:
        if not record.dense:
            sparse.setdefault(name_of(record.sparse), []).append(record)
    for record in series:
        if record.row["steps"] < steps:
            shorter.setdefault(record.row["steps"], []).append(record)
    return Group(
        variant(list(dense.values()), {}) if dense else None,
        tuple(variant(runs, dense) for runs in sparse.values()),
        tuple(variant(shorter[length], dense) for length in sorted(shorter, reverse=True)),
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


def whole_bounds(variant: Variant) -> list[float | None]:
    """FLOPs of the same tokens, dense ÷ FLOPs spent, probes in; of a dense run of fewer steps,
    FLOPs of its twin ÷ its own."""
    if not variant.dense:
        return [run.row["dense_flops"] / run.row["spent_flops"] for run in variant.runs]
    return [
        None if twin is None else twin.row["spent_flops"] / run.row["spent_flops"]
        for run, twin in zip(variant.runs, variant.twins, strict=True)
    ]


def first_speed(run: Record) -> float | None:
    """Tokens a second, median, of the first rung that omits anything; of a dense run its own."""
    rung = first_rung(run.row["rungs"]) or run.row["rungs"][0]
    return rung["tokens_per_second"] if is_measured(rung) else None
