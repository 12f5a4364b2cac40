"""Finished runs grouped for comparison, and what is measured of them.

A group has the runs of the same settings outside sparsity, on the same data; a variant the runs of
a group that differ in their seed alone. Every measure that compares is paired: a run with its dense
baseline, the dense run of the same group and seed.
"""

import collections
import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from sat_jax.config_values import name_of
from sat_jax.results.finished import DEFAULTS, FinishedRun, Settings
from sat_jax.results.speed import WholeRun, whole_run_speedup
from sat_jax.results.text import setting_text

_SLACK = 1.01  # lengths are whole steps, so no dense run has exactly the FLOPs of another run


@dataclasses.dataclass(frozen=True)
class Variant:
    """Runs that differ in their seed alone, in order of the seed.

    `name` tells the variant from the others of its group. `baselines` are the dense runs of the
    group by the seeds of `runs`, `lengths` the dense runs of all lengths.
    """

    name: str
    runs: tuple[FinishedRun, ...]
    baselines: tuple[FinishedRun | None, ...]
    lengths: tuple[tuple[FinishedRun, ...], ...]

    @property
    def dense(self) -> bool:
        return self.runs[0].dense

    @property
    def is_baseline(self) -> bool:
        return self.runs == self.baselines

    @property
    def sparsity(self) -> Settings:
        return self.runs[0].sparsity

    def over(self, measure: Callable[[FinishedRun], float | None]) -> list[float | None]:
        """Return `measure` of each run."""
        return [measure(run) for run in self.runs]

    def _paired(
        self, measure: Callable[[FinishedRun, FinishedRun], float | None]
    ) -> list[float | None]:
        return [
            None if baseline is None else measure(run, baseline)
            for run, baseline in zip(self.runs, self.baselines, strict=True)
        ]

    def differences(self) -> list[float | None]:
        """Perplexity relative to the dense baseline, in percent, of the runs that have one."""
        if self.is_baseline:
            return []
        pairs = zip(self.runs, self.baselines, strict=True)
        return [_difference(run, baseline) for run, baseline in pairs if baseline is not None]

    def differences_at_equal_flops(self) -> list[float | None]:
        """Perplexity relative to dense training with as many FLOPs, in percent, of the sparse runs
        whose seed has dense runs of two or more lengths around their FLOPs."""
        values = [
            difference_at_equal_flops(run.row, [dense.row for dense in lengths])
            for run, lengths in zip(self.runs, self.lengths, strict=True)
            if len(lengths) > 1 and not self.dense
        ]
        return [value for value in values if value is not None]

    def flops_shares(self) -> list[float | None]:
        """FLOPs, probes included, in percent of those of the dense baseline."""
        if self.dense:
            return self._paired(lambda run, dense: 100 * _flops(run) / _flops(dense))
        return self.over(lambda run: 100 * _flops(run) / run.row["dense_flops"])

    def measured_speedups(self) -> list[WholeRun]:
        """The speed-ups that the runs measured themselves; none if one of them has not."""
        measured = [whole_run_speedup(run.row["rungs"]) for run in self.runs]
        return [] if None in measured else [run for run in measured if run is not None]

    def speedups(self) -> list[float | None]:
        """Training time of the dense baseline, on the same device, ÷ that of the run."""
        return self._paired(
            lambda run, dense: dense.seconds / run.seconds if run.device == dense.device else None
        )


@dataclasses.dataclass(frozen=True)
class Group:
    """Runs of the same settings outside sparsity, with shorter dense runs, longest first.

    `reference` has the value of each setting of sparsity that most variants share; the name of a
    variant has its rate and the settings in which it differs from the reference. Sparse variants
    are ordered by these settings, then by rate.
    """

    dense: Variant | None
    shorter: tuple[Variant, ...]
    sparse: tuple[Variant, ...]
    reference: Settings

    @property
    def dense_variants(self) -> tuple[Variant, ...]:
        return (*([self.dense] if self.dense else []), *self.shorter)

    @property
    def variants(self) -> tuple[Variant, ...]:
        """All, dense first."""
        return (*self.dense_variants, *self.sparse)

    @property
    def runs(self) -> list[FinishedRun]:
        """The runs of full length; the shorter dense ones if there are no others."""
        full = [run for variant in (self.dense, *self.sparse) if variant for run in variant.runs]
        return full or [run for variant in self.shorter for run in variant.runs]

    def differing(self, variant: Variant) -> set[str]:
        """Return the settings of sparsity in which a variant differs from the reference."""
        return set(_differing(variant.sparsity, self.reference))


def make_groups(runs: Iterable[FinishedRun]) -> list[Group]:
    """Return groups and variants in order of their first runs; see `finished.newest`.

    A dense run of fewer steps than a group, and at least half of them, belongs to that group.
    """
    members: dict[str, list[FinishedRun]] = {}
    dense: dict[str, list[FinishedRun]] = {}
    for run in runs:
        members.setdefault(run.shared(), []).append(run)
        if run.dense:
            dense.setdefault(run.shared(["train.steps"]), []).append(run)
    groups = [
        _group(together, dense.get(together[0].shared(["train.steps"]), ()))
        for together in members.values()
    ]
    kept, shorter = set[int](), set[int]()
    for group in sorted(groups, key=lambda group: -group.runs[0].steps):
        if group.sparse or id(group.runs[0]) not in shorter:
            kept.add(id(group))
            shorter |= {id(run) for variant in group.shorter for run in variant.runs}
    return [group for group in groups if id(group) in kept]


def _group(members: Sequence[FinishedRun], dense: Sequence[FinishedRun]) -> Group:
    """`dense`: the dense runs of all lengths with the settings of `members`."""
    steps = members[0].steps
    lengths = collections.defaultdict(list)
    for run in dense:
        if steps <= 2 * run.steps and run.steps <= steps:
            lengths[run.steps].append(run)
    full = {run.seed: run for run in lengths[steps]}
    methods: dict[str, list[FinishedRun]] = {}
    for run in members:
        if not run.dense:
            methods.setdefault(name_of(run.sparsity), []).append(run)
    reference = reference_of([runs[0].sparsity for runs in methods.values()])

    def variant(name: str, runs: Sequence[FinishedRun]) -> Variant:
        ordered = tuple(sorted(runs, key=lambda run: run.seed))
        baselines = tuple(full.get(run.seed) for run in ordered)
        every_length = [run for same_length in lengths.values() for run in same_length]
        of_seed = [tuple(d for d in every_length if d.seed == run.seed) for run in ordered]
        return Variant(name, ordered, baselines, tuple(of_seed))

    sparse = [variant(variant_name(runs[0].sparsity, reference), runs) for runs in methods.values()]
    return Group(
        variant("dense", lengths[steps]) if full else None,
        tuple(
            variant(f"dense, {count:,} steps", lengths[count])
            for count in sorted(lengths, reverse=True)
            if count < steps
        ),
        tuple(sorted(sparse, key=lambda variant: variant.name.partition(", ")[::-1])),
        reference,
    )


def reference_of(methods: Sequence[Settings]) -> Settings:
    """Return the most frequent value of each setting; of several the default, else the first."""
    reference = {}
    for path, default in DEFAULTS.items():
        counts = collections.Counter(method[path] for method in methods)
        reference[path] = max(
            counts, key=lambda value: (counts[value], value == default), default=default
        )
    return reference


def _differing(sparsity: Settings, reference: Settings) -> list[str]:
    return [path for path, value in sparsity.items() if value != reference.get(path)]


def variant_name(sparsity: Settings, reference: Settings) -> str:
    """Name a method by its rate and the settings that differ from `reference`."""
    paths = [path for path in _differing(sparsity, reference) if path != "sparsity.rate"]
    rate = f"r = {setting_text(sparsity['sparsity.rate'])}"
    return ", ".join([rate, *settings_in_words({path: sparsity[path] for path in paths})])


def settings_in_words(settings: Mapping[str, Any]) -> list[str]:
    """Return each setting as `dense layers 0,1`."""
    return [
        f"{path.rpartition('.')[2].replace('_', ' ')} {setting_text(value)}"
        for path, value in settings.items()
    ]


def difference_at_equal_flops(
    row: Mapping[str, Any], dense: Sequence[Mapping[str, Any]]
) -> float | None:
    """Return the perplexity of a run relative to dense training with as many FLOPs, in percent.

    `dense` are rows of dense runs of several lengths, each with its complete schedule: between two
    of them log perplexity is interpolated linearly in log FLOPs. None if the run spent more FLOPs
    than the longest or fewer than the shortest (1 % of slack), or a perplexity is infinite.
    """
    spent, after = row["spent_flops"], row["perplexity_after"]
    reached = {other["spent_flops"]: other["perplexity_after"] for other in dense}
    if not reached or after is None or None in reached.values():
        return None
    costs = sorted(reached)
    if not costs[0] / _SLACK <= spent <= costs[-1] * _SLACK:
        return None
    expected = np.interp(np.log(spent), np.log(costs), np.log([reached[cost] for cost in costs]))
    return float(100 * (after / np.exp(expected) - 1))


def _difference(run: FinishedRun, baseline: FinishedRun) -> float | None:
    after, dense = run.row["perplexity_after"], baseline.row["perplexity_after"]
    return None if after is None or dense is None else 100 * (after / dense - 1)


def _flops(run: FinishedRun) -> float:
    return float(run.row["spent_flops"])
