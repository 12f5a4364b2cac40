"""Successive halving over the runs of a sweep (Jamieson and Talwalkar, arXiv:1502.07943).

The first round trains all runs on a share of their steps. The better half of the variants is
trained again on twice the steps, and so on; the last round has all steps. Every round has complete
runs from the initial weights: the learning rate decays to the last step of its own run, as it does
in the dense baselines, so nothing is continued from a shorter run. Only `train.steps` differs
between rounds; other settings that count steps, such as the warm-up, stay as they are.

Dense runs are baselines: they take part in every round. Variants are all other runs; those that
differ in their seed alone are one variant, whose score is the mean of their held-out perplexities.
"""

import dataclasses
import heapq
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

from sat_jax.config_values import build, changed, name_of, without_free
from sat_jax.errors import UserError
from sat_jax.results.planned import PlannedRun, plan_runs
from sat_jax.results.sweep import Settings, settings_text
from sat_jax.results.text import fixed_width, quantity

Train: TypeAlias = Callable[[Sequence[PlannedRun]], Mapping[str, float]]
"""Trains runs; returns the final held-out perplexities of those that finished, by name."""
_COMPARABLE = ("model.", "data.", "train.")


@dataclasses.dataclass(frozen=True)
class Round:
    """All runs of a round, before any is eliminated: dense ones, and variants by a name that is the
    same in all rounds. Variants train `steps` steps."""

    steps: int
    baselines: tuple[PlannedRun, ...]
    variants: Mapping[str, tuple[PlannedRun, ...]]

    def runs(self, variants: Iterable[str]) -> list[PlannedRun]:
        """Return the baselines and the runs of some variants."""
        return [*self.baselines, *(run for name in variants for run in self.variants[name])]


@dataclasses.dataclass(frozen=True)
class Result:
    """The perplexities of one round by name of the run, the variants that were trained, best first,
    and those that go on."""

    round: Round
    perplexities: Mapping[str, float]
    ranking: tuple[str, ...]
    kept: tuple[str, ...]


def plan_rounds(
    values: Mapping[str, Any], fixed: Settings, settings_of_runs: Sequence[Settings], rounds: int
) -> list[Round]:
    """Return the rounds of a sweep; the arguments are those of `plan_runs`.

    Raises `UserError` for a number of rounds that is not possible, variants of different seeds, and
    variants whose perplexities are not comparable.
    """
    variants = _by_variant(run for run in plan_runs(values, fixed, settings_of_runs) if _omits(run))
    runs = [run for group in variants.values() for run in group]
    _check_comparable(runs)
    seeds = {tuple(sorted(run.config.seed for run in group)) for group in variants.values()}
    if len(seeds) > 1:
        texts = " and ".join(", ".join(map(str, numbers)) for numbers in sorted(seeds))
        raise UserError(f"--halving: variants have the seeds {texts}; accepted: the same for all")
    steps = runs[0].config.train.steps if runs else 0
    most = min(math.ceil(math.log2(len(variants))) + 1, steps.bit_length()) if runs else 0
    of = f"{len(variants)} variants with omission of {steps} steps"
    if most < 2:
        raise UserError(f"--halving: nothing to halve in {of}; accepted: two or more of each")
    if not 2 <= rounds <= most:
        raise UserError(f"--halving {rounds}; accepted: 2 to {most} rounds for {of}")

    def plan(divisor: int) -> Round:
        shorter = [_shorter(values, fixed, settings, divisor) for settings in settings_of_runs]
        runs = plan_runs(values, fixed, shorter)
        dense = tuple(run for run in runs if not _omits(run))
        variants = _by_variant(run for run in runs if _omits(run))
        return Round(next(iter(variants.values()))[0].config.train.steps, dense, variants)

    return [plan(2**number) for number in reversed(range(rounds))]


def halve(rounds: Sequence[Round], train: Train, log: Callable[[str], None]) -> list[Result]:
    """Train the rounds with `train` and return their results.

    The better half goes on, of an odd number one more than the worse half. A variant does not go on
    if one of its runs failed or ended at an infinite perplexity. `log` receives a line each round.
    """
    results: list[Result] = []
    kept = tuple(rounds[0].variants)
    for number, this in enumerate(rounds, 1):
        perplexities = train(this.runs(kept))
        scores = {name: _score(this.variants[name], perplexities) for name in kept}
        ranking = tuple(sorted(kept, key=lambda name: scores[name]))
        best = ranking if this is rounds[-1] else ranking[: _better_half(len(ranking))]
        kept = tuple(name for name in best if math.isfinite(scores[name]))
        results.append(Result(this, perplexities, ranking, kept))
        log(f"round {number} of {len(rounds)}: {len(kept)} of {len(ranking)} variants are left")
        if not kept:
            break
    return results


def plan_table(rounds: Sequence[Round]) -> str:
    """Return a table of the rounds with the most FLOPs that each may take, finished runs included,
    and a line that compares them with all runs at full length."""
    rows, total, left = [], 0.0, len(rounds[0].variants)
    for number, this in enumerate(rounds, 1):
        runs = [*this.variants.values()]
        costs = [sum(run.flops()[0] for run in group) for group in runs]
        dense = sum(run.flops()[0] for run in this.baselines)
        most = dense + sum(heapq.nlargest(left, costs))
        count = len(this.baselines) + left * len(runs[0])
        rows.append([*map(str, (number, this.steps, left, count)), quantity(most, "FLOP")])
        total, full, left = total + most, dense + sum(costs), _better_half(left)
    table = fixed_width(("round", "steps", "variants", "runs", "at most"), rows)
    every = f"all runs at full length: {quantity(full, 'FLOP')}"
    return f"{table}\n\nsuccessive halving: at most {quantity(total, 'FLOP')}; {every}"


def result_table(results: Sequence[Result]) -> str:
    """Return a table of all variants with their perplexity in each round, means over seeds, and the
    round after which they were eliminated: finalists first, then the latest eliminated, and the
    dense runs as long as the variants."""
    order = dict.fromkeys(name for result in reversed(results) for name in result.ranking)
    rows = []
    for name in order:
        cells = [
            _cell(result.round.variants[name], result.perplexities)
            if name in result.ranking
            else "-"
            for result in results
        ]
        last = max(n for n, result in enumerate(results) if name in result.ranking)
        is_kept = name in results[last].kept
        end = f"rank {results[last].ranking.index(name) + 1}"
        end = end if is_kept else f"eliminated after round {last + 1}"
        rows.append([_label(results[0].round.variants[name][0]), *cells, end])
    dense = [
        _by_variant(r for r in result.round.baselines if r.config.train.steps == result.round.steps)
        for result in results
    ]
    for name, runs in dense[0].items():
        cells = [_cell(d[name], r.perplexities) for d, r in zip(dense, results, strict=True)]
        rows.append([_label(runs[0]), *cells, "baseline"])
    heads = [f"{result.round.steps} steps" for result in results]
    return fixed_width(("variant", *heads, "result"), rows)


def _better_half(number: int) -> int:
    return math.ceil(number / 2)


def _omits(run: PlannedRun) -> bool:
    return run.config.omitted_share > 0


def _by_variant(runs: Iterable[PlannedRun]) -> dict[str, tuple[PlannedRun, ...]]:
    """Return the runs by a fingerprint of their settings without seed and number of steps."""
    groups: dict[str, list[PlannedRun]] = {}
    for run in runs:
        values = changed(without_free(run.config))
        name = name_of({k: v for k, v in values.items() if k not in ("seed", "train.steps")})
        groups.setdefault(name, []).append(run)
    return {name: tuple(group) for name, group in groups.items()}


def _check_comparable(runs: Sequence[PlannedRun]) -> None:
    settings = [changed(without_free(run.config)) for run in runs]
    for path in sorted({path for values in settings for path in values}):
        values = {repr(values.get(path)) for values in settings}
        if path.startswith(_COMPARABLE) and len(values) > 1:
            raise UserError(
                "--halving compares perplexities at equal steps, and runs with omission differ in"
                f" {path}; accepted: runs that differ in sparsity, optimizer, lora and seed"
            )


def _shorter(
    values: Mapping[str, Any], fixed: Settings, settings: Settings, divisor: int
) -> Settings:
    steps = build(values, {**fixed, **settings}).train.steps
    return {**settings, "train.steps": max(1, round(steps / divisor))}


def _score(runs: Sequence[PlannedRun], perplexities: Mapping[str, float]) -> float:
    return statistics.fmean(perplexities.get(run.name, math.inf) for run in runs)


def _cell(runs: Sequence[PlannedRun], perplexities: Mapping[str, float]) -> str:
    if any(run.name not in perplexities for run in runs):
        return "failed"
    return f"{_score(runs, perplexities):.3f}"


def _label(run: PlannedRun) -> str:
    apart = ("seed", "train.steps")
    return settings_text({k: v for k, v in run.settings.items() if k not in apart})
