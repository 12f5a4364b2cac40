"""Finished runs grouped for comparison, and what is measured of them.

A group has the runs of the same settings outside sparsity, on the same data; a variant the runs of
a group that differ in their seed alone. Every measure that compares is paired: a run with its dense
baseline, the dense run of the same group and seed.
"""

import collections
import dataclasses
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from sat_jax.config_values import name_of
from sat_jax.results.finished import DEFAULTS, FinishedRun, Settings, finished_runs
from sat_jax.results.rows import Row
from sat_jax.results.speed import whole_run_speedup
from sat_jax.results.text import setting_text

_SLACK = 1.01  # lengths are whole steps, so no dense run has exactly the FLOPs of another run

Values = Sequence[float | None]


class Mean(NamedTuple):
    """A mean and its standard error, which is None for a single value."""

    value: float
    error: float | None = None

    def text(self, form: str) -> str:
        """Format as `1.234 ± 0.005`, each number by the format `form`."""
        if self.error is None:
            return form.format(self.value)
        return f"{form.format(self.value)} ± {form.replace('+', '').format(self.error)}"


def mean_of(values: Values) -> Mean | None:
    """Return the mean of `values`; None if any is None, or there are none."""
    known = [value for value in values if value is not None]
    if len(known) < len(values) or not known:
        return None
    error = statistics.stdev(known) / len(known) ** 0.5 if len(known) > 1 else None
    return Mean(statistics.mean(known), error)


@dataclasses.dataclass(frozen=True)
class Variant:
    """Runs that differ in their seed alone, in order of the seed.

    `name` tells the variant from the others of its group. `lengths` has the dense runs of the group
    with the seed of each run, of all lengths; the one as long as the run is its dense baseline.
    """

    name: str
    runs: tuple[FinishedRun, ...]
    lengths: tuple[tuple[FinishedRun, ...], ...]
    steps: int  # of the group; shorter dense variants have fewer

    @property
    def dense(self) -> bool:
        return self.runs[0].dense

    @property
    def is_baseline(self) -> bool:
        return self.dense and self.runs[0].steps == self.steps

    def pairs(self) -> list[tuple[FinishedRun, FinishedRun | None]]:
        """Return each run with its dense baseline, None where that is missing."""
        baselines = [{dense.steps: dense for dense in lengths} for lengths in self.lengths]
        return [(r, known.get(self.steps)) for r, known in zip(self.runs, baselines, strict=True)]

    def over(self, measure: Callable[[FinishedRun], float | None]) -> Values:
        """Return `measure` of each run."""
        return [measure(run) for run in self.runs]

    def differences(self) -> Values:
        """Perplexity relative to the dense baseline, in percent, of the runs that have one."""
        if self.is_baseline:
            return []
        return [
            percent_from(run.row["perplexity_after"], dense.row["perplexity_after"])
            for run, dense in self.pairs()
            if dense
        ]

    def differences_at_equal_flops(self) -> Values:
        """Perplexity relative to dense training with as many FLOPs, in percent, of the sparse runs
        whose seed has dense runs of two or more lengths around their FLOPs."""
        values = [
            difference_at_equal_flops(run.row, [dense.row for dense in lengths])
            for run, lengths in zip(self.runs, self.lengths, strict=True)
            if len(lengths) > 1 and not self.dense
        ]
        return [value for value in values if value is not None]

    def flops_shares(self) -> Values:
        """FLOPs, probes included, in percent of those of the dense baseline."""
        spent = self.over(lambda run: run.row["spent_flops"])
        whole = self.over(lambda run: run.row["dense_flops"])
        if self.dense:
            whole = [dense and dense.row["spent_flops"] for _, dense in self.pairs()]
        return [flops and 100 * own / flops for own, flops in zip(spent, whole, strict=True)]

    def speedup_and_bound(self) -> tuple[Mean | None, Mean | None]:
        """Return the speed-up that the runs measured of their steps, with its FLOP bound.

        If they did not, training time of the dense baseline, at the same commit on the same device,
        ÷ that of the run, with the bound of all FLOPs.
        """
        measured = [whole_run_speedup(run.row["rungs"]) for run in self.runs]
        known = [run for run in measured if run is not None]
        if len(known) == len(measured):
            speedup = mean_of([run.speedup for run in known])
            if speedup and speedup.error is None:
                speedup = speedup._replace(error=known[0].spread)
            return speedup, mean_of([run.bound for run in known])
        times = [
            dense.seconds / run.seconds if dense and run.place == dense.place else None
            for run, dense in self.pairs()
        ]
        return mean_of(times), mean_of([share and 100 / share for share in self.flops_shares()])

    def loss_differences(self, parts: int) -> list[list[float | None]]:
        """Training loss minus that of the dense baseline in each of `parts` equal parts of a run,
        for the runs with a dense baseline."""
        pairs = [[part_means(r.row.get("curve", {}), parts) for r in p if r] for p in self.pairs()]
        return [
            [None if None in (a, b) else a - b for a, b in zip(*losses, strict=True)]
            for losses in pairs
            if len(losses) == 2 and all(losses)
        ]


@dataclasses.dataclass(frozen=True)
class Group:
    """Runs of the same settings outside sparsity, with dense runs of fewer steps.

    `dense` are variants from the longest, which is the dense baseline if there is one. `reference`
    has the value of each setting of sparsity that most variants share; the name of a variant has
    its rate and the settings in which it differs from the reference. Sparse variants are ordered by
    these settings, then by rate.
    """

    dense: tuple[Variant, ...]
    sparse: tuple[Variant, ...]
    reference: Settings

    @property
    def variants(self) -> tuple[Variant, ...]:
        """All, dense first."""
        return self.dense + self.sparse

    @property
    def runs(self) -> list[FinishedRun]:
        """The runs of full length; the shorter dense ones if there are no others."""
        runs = [run for variant in self.variants for run in variant.runs]
        return [run for run in runs if run.steps == max(run.steps for run in runs)]

    def differing(self, variant: Variant) -> set[str]:
        """Return the settings of sparsity in which a variant differs from the reference."""
        return set(_differing(variant.runs[0].sparsity, self.reference))


def make_groups(rows: Iterable[Row]) -> list[Group]:
    """Return the groups and variants of the runs among rows, longest runs first, then in order of
    their first runs.

    A dense run of fewer steps than a group, and at least half of them, belongs to that group.
    """
    members = collections.defaultdict(list)
    dense = collections.defaultdict(list)
    for run in finished_runs(rows):
        members[run.shared()].append(run)
        if run.dense:
            dense[run.shared(["train.steps"])].append(run)
    groups, shorter = list[Group](), set[int]()
    for some in sorted(members.values(), key=lambda some: -some[0].steps):
        if not all(id(run) in shorter for run in some):
            groups.append(_group(some, dense[some[0].shared(["train.steps"])]))
            shorter |= {id(run) for variant in groups[-1].dense for run in variant.runs}
    return groups


def _group(members: Sequence[FinishedRun], dense: Sequence[FinishedRun]) -> Group:
    """`dense`: the dense runs of all lengths with the settings of `members`."""
    steps = members[0].steps
    dense = [run for run in dense if steps <= 2 * run.steps and run.steps <= steps]

    def variant(name: str, runs: Sequence[FinishedRun]) -> Variant:
        ordered = tuple(sorted(runs, key=lambda run: run.seed))
        lengths = (tuple(other for other in dense if other.seed == run.seed) for run in ordered)
        return Variant(name, ordered, tuple(lengths), steps)

    methods: dict[str, list[FinishedRun]] = {}
    for run in members:
        if not run.dense:
            methods.setdefault(name_of(run.sparsity), []).append(run)
    reference = reference_of([runs[0].sparsity for runs in methods.values()])
    sparse = [variant(variant_name(runs[0].sparsity, reference), runs) for runs in methods.values()]
    lengths = {
        length: "dense" if length == steps else f"dense, {length:,} steps"
        for length in sorted({run.steps for run in dense}, reverse=True)
    }
    return Group(
        tuple(
            variant(name, [run for run in dense if run.steps == length])
            for length, name in lengths.items()
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
    if not reached or None in reached.values():
        return None
    costs = sorted(reached)
    if not costs[0] / _SLACK <= spent <= costs[-1] * _SLACK:
        return None
    expected = np.interp(np.log(spent), np.log(costs), np.log([reached[cost] for cost in costs]))
    return percent_from(after, float(np.exp(expected)))


def percent_from(perplexity: float | None, dense: float | None) -> float | None:
    """Return the relative difference in percent; None if a perplexity is infinite."""
    return None if perplexity is None or dense is None else 100 * (perplexity / dense - 1)


def part_means(curve: Mapping[str, Sequence[float | None]], parts: int) -> list[float | None]:
    """Return the mean training loss of each of `parts` equal parts of a run's tokens.

    A point across the end of a part counts to both by its tokens. None from the first loss that is
    not finite; empty for a curve of fewer points than parts.
    """
    if len(curve.get("tokens", ())) < parts:
        return []
    tokens = np.array([0, *curve["tokens"]], float)
    totals = np.array([0, *np.cumsum(np.array(curve["loss"], float) * np.diff(tokens))])
    ends = np.linspace(0, tokens[-1], parts + 1)
    means = np.diff(np.interp(ends, tokens, totals)) / np.diff(ends)
    return [float(mean) if np.isfinite(mean) else None for mean in means]
