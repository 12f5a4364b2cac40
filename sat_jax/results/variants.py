"""Finished runs grouped for comparison, and what is measured of them.

A group has the runs of the same settings outside sparsity, on the same data; a variant the runs of
a group that differ in their seed alone. Every measure that compares is paired: a run with its dense
baseline, the dense run of the same group and seed.
"""

import collections
import dataclasses
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from sat_jax.config_values import name_of
from sat_jax.results.finished import DEFAULTS, FinishedRun, Settings, finished_runs
from sat_jax.results.rows import Row
from sat_jax.results.speed import WholeRun, whole_run_speedup
from sat_jax.results.text import setting_text

FEWER = "§"

_SLACK = 1.01  # lengths are whole steps, so no dense run has exactly the FLOPs of another run


class Mean(NamedTuple):
    """A mean and its standard error, which is None for a single value; `fewer`: some runs have no
    value."""

    value: float
    error: float | None = None
    fewer: bool = False

    def text(self, form: Callable[[float], str]) -> str:
        """Format as `1.234 ± 0.005`, each number by `form`, with a mark for `fewer`."""
        error = "" if self.error is None else f" ± {form(self.error).lstrip('+')}"
        return f"{form(self.value)}{error}{FEWER * self.fewer}"


def mean_of(values: Sequence[float | None]) -> Mean | None:
    """Return the mean of the known values; None if there are none, or one is not finite."""
    known = [value for value in values if value is not None]
    if not known or not all(map(math.isfinite, known)):
        return None
    error = statistics.stdev(known) / len(known) ** 0.5 if len(known) > 1 else None
    return Mean(statistics.mean(known), error, len(known) < len(values))


@dataclasses.dataclass(frozen=True)
class PairedRun(FinishedRun):
    """A finished run with its dense baseline, and the dense runs of its group and seed of all
    lengths. Measures are None where the run that they need is missing, and not finite where a
    perplexity or loss is not."""

    baseline: FinishedRun | None
    lengths: tuple[FinishedRun, ...]

    @property
    def is_baseline(self) -> bool:
        return self.baseline is not None and self.row is self.baseline.row

    def difference(self) -> float | None:
        """Perplexity relative to the dense baseline, in percent."""
        if self.baseline is None or self.is_baseline:
            return None
        return percent_from(self.perplexity, self.baseline.perplexity)

    def difference_at_equal_flops(self) -> float | None:
        """Perplexity of a sparse run relative to dense training with as many FLOPs, in percent.

        Log perplexity is interpolated linearly in log FLOPs between dense runs of two or more
        lengths, each with its complete schedule. None if the run spent more FLOPs than the longest
        or fewer than the shortest (1 % of slack).
        """
        reached = sorted((dense.flops, dense.perplexity) for dense in self.lengths)
        if self.dense or len(reached) < 2:
            return None
        if not reached[0][0] / _SLACK <= self.flops <= reached[-1][0] * _SLACK:
            return None
        expected = np.exp(np.interp(np.log(self.flops), *np.log(reached).T))
        return percent_from(self.perplexity, float(expected))

    def flops_share(self) -> float | None:
        """FLOPs, probes included, in percent of those of the dense baseline."""
        if not self.dense:
            return 100 * self.flops / float(self.row["dense_flops"])
        return 100 * self.flops / self.baseline.flops if self.baseline else None

    def speedup(self) -> WholeRun | None:
        """The speed-up that the run measured of its steps, with its FLOP bound.

        If it did not, training time of the dense baseline, at the same commit on the same device,
        ÷ that of the run, with the bound of all FLOPs.
        """
        if self.is_baseline:
            return None
        if measured := whole_run_speedup(self.row["rungs"]):
            return measured
        share, dense = self.flops_share(), self.baseline
        comparable = dense is not None and self.place == dense.place
        speedup = dense.seconds / self.seconds if dense and comparable else math.nan
        return WholeRun(speedup, None, 100 / share) if share else None

    def loss_difference(self, part: int, parts: int) -> float | None:
        """Training loss minus that of the dense baseline in one of `parts` equal parts of the run,
        from 0."""
        losses = [part_means(run.row, parts) for run in (self, self.baseline) if run]
        return losses[0][part] - losses[1][part] if len(losses) == 2 and all(losses) else None


@dataclasses.dataclass(frozen=True)
class Variant:
    """Runs that differ in their seed alone, in order of the seed; `name` tells the variant from the
    others of its group."""

    name: str
    runs: tuple[PairedRun, ...]

    @property
    def dense(self) -> bool:
        return self.runs[0].dense

    @property
    def is_baseline(self) -> bool:
        return self.runs[0].is_baseline


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
    def runs(self) -> list[PairedRun]:
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
        if not all(id(run.row) in shorter for run in some):
            groups.append(_group(some, dense[some[0].shared(["train.steps"])]))
            shorter |= {id(run.row) for variant in groups[-1].dense for run in variant.runs}
    return groups


def _group(members: Sequence[FinishedRun], dense: Sequence[FinishedRun]) -> Group:
    """`dense`: the dense runs of all lengths with the settings of `members`."""
    steps = members[0].steps
    dense = [run for run in dense if steps <= 2 * run.steps and run.steps <= steps]

    def variant(name: str, runs: Iterable[FinishedRun]) -> Variant:
        paired = []
        for run in sorted(runs, key=lambda run: run.seed):
            lengths = tuple(other for other in dense if other.seed == run.seed)
            baseline = next((other for other in lengths if other.steps == steps), None)
            paired.append(PairedRun(run.row, baseline, lengths))
        return Variant(name, tuple(paired))

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
        tuple(variant(lengths[n], (run for run in dense if run.steps == n)) for n in lengths),
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
    """Name a method by its rate or density and the settings that differ from `reference`."""
    rate, density = "sparsity.rate", "sparsity.weights.density"
    first = f"r = {setting_text(sparsity[rate])}"
    if sparsity[density] < 1:
        first = f"{100 * sparsity[density]:g} % of blocks"
    paths = [p for p in _differing(sparsity, reference) if p not in (rate, density)]
    return ", ".join([first, *settings_in_words({path: sparsity[path] for path in paths})])


def settings_in_words(settings: Mapping[str, Any]) -> list[str]:
    """Return each setting as `dense layers 0,1`."""
    return [
        f"{path.rpartition('.')[2].replace('_', ' ')} {setting_text(value)}"
        for path, value in settings.items()
    ]


def percent_from(perplexity: float, dense: float) -> float:
    """Return the relative difference in percent; not finite if a perplexity is not."""
    return 100 * (perplexity / dense - 1) if math.isfinite(dense) else math.nan


def part_means(row: Row, parts: int) -> list[float]:
    """Return the mean training loss of each of `parts` equal parts of a run's tokens.

    A point across the end of a part counts to both by its tokens. NaN from the first loss that is
    not finite; empty for a curve of fewer points than parts.
    """
    curve = row.get("curve", {})
    if len(curve.get("tokens", ())) < parts:
        return []
    tokens = np.array([0, *curve["tokens"]], float)
    totals = np.array([0, *np.cumsum(np.array(curve["loss"], float) * np.diff(tokens))])
    ends = np.linspace(0, tokens[-1], parts + 1)
    means: list[float] = (np.diff(np.interp(ends, tokens, totals)) / np.diff(ends)).tolist()
    return means
