"""Sparse training from scratch against what else the same FLOPs buy: dense runs of fewer steps, and
smaller dense models.

Each method is shown at the learning rates, of matrices and of all other parameters, with the lowest
perplexity of the first seed among those that were tried. Runs of the same data and all other
settings are compared, whatever the size of the model.
"""

import collections
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from sat_jax.config_values import find
from sat_jax.results.finished import FinishedRun, finished_runs
from sat_jax.results.rows import Row
from sat_jax.results.tables import Table
from sat_jax.results.text import percent
from sat_jax.results.variants import Mean, mean_of, percent_from, reference_of, variant_name

_RATES = ("optimizer.learning_rate", "optimizer.matrix_scale")
_SIZES = tuple(f"model.{name}" for name in ("d_model", "n_layers", "n_heads", "d_ff"))


class _Method(NamedTuple):
    """The runs of a method by seed, at one learning rate. `sizes`: settings of the model; `rates`:
    the values of `_RATES`."""

    name: str
    sizes: Mapping[str, Any]
    rates: tuple[float, ...]
    runs: dict[int, FinishedRun]

    @property
    def dense(self) -> bool:
        return next(iter(self.runs.values())).dense

    @property
    def steps(self) -> int:
        return next(iter(self.runs.values())).steps

    @property
    def perplexity(self) -> Mean | None:
        return mean_of([run.perplexity for run in self.runs.values()])


def from_scratch_tables(rows: Sequence[Row]) -> list[Table]:
    """Return a table for each set of runs with block-sparse ones among them, or sparse ones and
    dense models of several sizes."""
    together = collections.defaultdict(list)
    for run in finished_runs(rows):
        together[run.shared([*_RATES, "train.steps", *_SIZES])].append(run)
    return [_table(runs) for runs in together.values() if _compares(runs)]


def _compares(runs: Sequence[FinishedRun]) -> bool:
    sparse = [run for run in runs if not run.dense]
    if any(run.sparsity["sparsity.weights.density"] < 1 for run in sparse):
        return True
    return bool(sparse) and len({str(_sizes(run)) for run in runs if run.dense}) > 1


def _table(runs: Sequence[FinishedRun]) -> Table:
    methods = _best_rates(runs)
    dense = [method for method in methods if method.dense]
    largest = max((m.runs[min(m.runs)].flops, m.steps) for m in dense)
    baseline = next(m for m in dense if (m.runs[min(m.runs)].flops, m.steps) == largest)
    shorter = [m for m in dense if m.sizes == baseline.sizes]
    smaller = [m for m in dense if m.steps == baseline.steps]
    body = []
    for method in sorted(methods, key=lambda m: (not m.dense, -m.runs[min(m.runs)].flops)):
        others = [
            _difference(method, lambda seed: _at_flops([baseline], seed, None)),
            *(
                "-"
                if method in family
                else _difference(
                    method, lambda seed, f=family, m=method: _at_flops(f, seed, m.runs[seed].flops)
                )
                for family in (shorter, smaller)
            ),
        ]
        mean = method.perplexity
        shares = [
            r.flops / baseline.runs[s].flops for s, r in method.runs.items() if s in baseline.runs
        ]
        body.append(
            (
                method.name,
                _rates_text(method.rates),
                str(len(method.runs)),
                mean.text("{:.1f}".format) if mean else "-",
                percent(float(np.mean(shares))) if shares else "-",
                "-" if method is baseline else others[0],
                *others[1:],
            )
        )
    header = ("variant", "learning rate", "seeds", "perplexity", "FLOPs", "from dense",
              "at equal FLOPs: fewer steps", "smaller model")  # fmt: skip
    first = runs[0].row
    tokens = baseline.runs[min(baseline.runs)].row["tokens"]
    caption = (
        f"Held-out perplexity after {baseline.steps:,} steps, {tokens / 1e6:.2f}M tokens; mean and"
        f" standard error over seeds; data {str(first['data'])[:8]}"
    )
    return Table("from_scratch", "Training from scratch", caption, header, tuple(body))


def _rates_text(rates: tuple[float, ...]) -> str:
    rate, scale = rates
    return f"{rate:g}" if scale == 1 else f"{rate:g} × {scale:g}"


def _best_rates(runs: Sequence[FinishedRun]) -> list[_Method]:
    """Return each method at the learning rates with the lowest perplexity of the first seed."""
    sparse = [run.sparsity for run in runs if not run.dense]
    reference, full = reference_of(sparse), max(run.steps for run in runs)
    tried: dict[str, list[_Method]] = {}
    for run in runs:
        sizes = _sizes(run)
        name = "dense" if run.dense else variant_name(run.sparsity, reference)
        name += "" if run.steps == full else f", {run.steps:,} steps"
        rates = tuple(float(run.settings.get(path, find(path).default)) for path in _RATES)
        known = tried.setdefault(f"{name} {sizes}", [])
        method = next((m for m in known if m.rates == rates), None)
        if method is None:
            known.append(method := _Method(name, sizes, rates, {}))
        method.runs[run.seed] = run
    best = [min(some, key=lambda m: m.runs[min(m.runs)].perplexity) for some in tried.values()]
    values = {path: [method.sizes[path] for method in best] for path in _SIZES}
    largest = {path: max(some) for path, some in values.items() if len(set(some)) > 1}
    return [m._replace(name=m.name + _size_text(m.sizes, largest)) for m in best]


def _sizes(run: FinishedRun) -> dict[str, Any]:
    return {path: run.settings.get(path, find(path).default) for path in _SIZES}


def _size_text(sizes: Mapping[str, Any], largest: Mapping[str, Any]) -> str:
    """Return the sizes of the model in which it is not the largest."""
    return "".join(
        f", {path.removeprefix('model.').replace('n_', '').replace('_', ' ')} {sizes[path]}"
        for path in largest
        if sizes[path] != largest[path]
    )


def _at_flops(family: Sequence[_Method], seed: int, flops: float | None) -> float | None:
    """Return the perplexity that a family of dense runs has for so many FLOPs, or for fewer where
    these are better: log perplexity is linear in log FLOPs between runs that no cheaper one beats.
    None outside their range. `flops` None: of its only one."""
    points = sorted((m.runs[seed].flops, m.runs[seed].perplexity) for m in family if seed in m.runs)
    if flops is None:
        return points[0][1] if points else None
    if len(points) < 2 or not 0.99 * points[0][0] <= flops <= 1.01 * points[-1][0]:
        return None
    front = [p for n, p in enumerate(points) if all(p[1] < cheaper[1] for cheaper in points[:n])]
    return float(np.exp(np.interp(np.log(flops), *np.log(front).T)))


def _difference(method: _Method, reference: Any) -> str:
    """Return the mean difference in percent from `reference(seed)`, seed by seed."""
    others = {seed: reference(seed) for seed in method.runs}
    mean = mean_of(
        [
            None if other is None else percent_from(method.runs[seed].perplexity, other)
            for seed, other in others.items()
        ]
    )
    return mean.text("{:+.1f} %".format) if mean else "-"
