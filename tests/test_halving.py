"""Successive halving, with a training that returns given perplexities."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from sat_jax.config_values import experiment, to_dict
from sat_jax.errors import UserError
from sat_jax.results.halving import Round, halve, plan_rounds, plan_table, result_table
from sat_jax.results.launch import Job
from sat_jax.results.planned import PlannedRun, plan_runs
from sat_jax.results.sweep import cross, parse_axes
from sat_jax.train.files import write_json
from scripts import sweep as script
from tests.conftest import ROOT
from tests.result_runs import DENSE, SPARSE, summary_of

TINY = str(ROOT / "experiments/tiny.py")
FIXED = {"train.steps": 18, "sparsity.metric": "uniform"}
RATES = "sparsity.rate=0,0.1,0.2,0.3,0.4,0.5"


@pytest.fixture(autouse=True)
def in_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def rounds_of(number: int, *axes: str) -> list[Round]:
    runs = cross([{}], parse_axes(axes))
    return plan_rounds(experiment(TINY), FIXED, runs, number)


def trained(runs: Sequence[PlannedRun]) -> list[tuple[float, int, int]]:
    return [(r.config.sparsity.rate, r.config.train.steps, r.config.seed) for r in runs]


def test_the_better_half_goes_on_with_twice_the_steps() -> None:
    """Of 18 steps 4.5 are rounded to 4. The order of the variants changes with the steps."""
    score = {4: [1, 2, 3, 4, 5], 9: [3, 1, 2], 18: [0, 2, 1]}  # by tenths of the rate, from 0.1
    seen: list[list[tuple[float, int, int]]] = []

    def train(runs: Sequence[PlannedRun]) -> dict[str, float]:
        seen.append(trained(runs))
        return {
            run.name: 9.0 if rate == 0 else score[steps][round(10 * rate) - 1]
            for run, (rate, steps, _) in zip(runs, seen[-1], strict=True)
        }

    lines: list[str] = []
    rounds = rounds_of(3, RATES)
    results = halve(rounds, train, lines.append)
    assert seen == [
        [(rate, 4, 0) for rate in (0, 0.1, 0.2, 0.3, 0.4, 0.5)],
        [(rate, 9, 0) for rate in (0, 0.1, 0.2, 0.3)],
        [(rate, 18, 0) for rate in (0, 0.2, 0.3)],
    ]
    assert lines[0] == "round 1 of 3: 3 of 5 variants are left"
    assert [line.split() for line in result_table(results).splitlines()[2:]] == [
        ["sparsity.rate=0.3", "3.000", "2.000", "1.000", "rank", "1"],
        ["sparsity.rate=0.2", "2.000", "1.000", "2.000", "rank", "2"],
        ["sparsity.rate=0.1", "1.000", "3.000", "-", "eliminated", "after", "round", "2"],
        ["sparsity.rate=0.4", "4.000", "-", "-", "eliminated", "after", "round", "1"],
        ["sparsity.rate=0.5", "5.000", "-", "-", "eliminated", "after", "round", "1"],
        ["sparsity.rate=0", "9.000", "9.000", "9.000", "baseline"],
    ]
    *table, _, total = plan_table(rounds).splitlines()
    assert [line.split()[:4] for line in table[2:]] == [
        ["1", "4", "5", "6"], ["2", "9", "3", "4"], ["3", "18", "2", "3"],
    ]  # fmt: skip
    assert total.startswith("successive halving: at most ")
    without = plan_runs(experiment(TINY), FIXED, cross([{}], parse_axes([RATES])))
    assert {run.name for run in without} == {r.name for r in rounds[2].runs(rounds[2].variants)}


def test_a_score_is_the_mean_over_seeds_and_needs_all_of_them() -> None:
    """At rate 0.1 one seed is the best of all and the other bad; a run at 0.3 fails."""
    rounds = rounds_of(2, "sparsity.rate=0.1,0.2,0.3", "seed=0,1")
    score = {0.1: (1.0, 9.0), 0.2: (4.0, 5.0), 0.3: (0.0, 0.0)}

    def train(runs: Sequence[PlannedRun]) -> dict[str, float]:
        rates = {r.name: score[r.config.sparsity.rate][r.config.seed] for r in runs}
        failed = [r.name for r in runs if r.config.sparsity.rate == 0.3 and r.config.seed == 1]
        return {name: value for name, value in rates.items() if name not in failed}

    first, second = halve(rounds, train, print)
    rates = [rounds[0].variants[name][0].config.sparsity.rate for name in first.ranking]
    assert rates == [0.2, 0.1, 0.3]
    assert trained(second.round.runs(second.ranking)) == [
        (0.2, 18, 0), (0.2, 18, 1), (0.1, 18, 0), (0.1, 18, 1),
    ]  # fmt: skip
    lines = [line.split() for line in result_table([first, second]).splitlines()]
    assert lines[-1][:3] == ["sparsity.rate=0.3", "failed", "-"]
    infinite = halve(rounds, lambda runs: {r.name: float("inf") for r in runs}, print)
    assert len(infinite) == 1 and not infinite[0].kept


def test_dense_runs_of_other_lengths_are_baselines() -> None:
    runs = [{"sparsity.rate": 0.1}, {"sparsity.rate": 0.2}, {"sparsity.rate": 0.0}]
    shorter = [{"sparsity.rate": 0.0, "train.steps": 12}]
    rounds = plan_rounds(experiment(TINY), {}, [*runs, *shorter], 2)
    steps = experiment(TINY)["train"]["steps"]
    lengths = [[run.config.train.steps for run in this.baselines] for this in rounds]
    assert lengths == [[steps // 2, 6], [steps, 12]]


@pytest.mark.parametrize(
    ("number", "axes", "message"),
    [
        (
            1,
            ["sparsity.rate=0.1,0.2"],
            "1; accepted: 2 to 2 rounds for 2 variants with omission of",
        ),
        (4, ["sparsity.rate=0.1,0.2,0.3"], "4; accepted: 2 to 3 rounds for 3 variants"),
        (2, ["seed=0,1", "sparsity.rate=0"], ": nothing to halve in 0 variants with omission of 0"),
        (2, ["sparsity.rate=0.1,0.2", "train.steps=4,6"], " compares .* differ in train.steps;"),
        (2, ["sparsity.rate=0.1,0.2", "data.row_length=16,32"], " .* differ in data.row_length;"),
    ],
)
def test_what_cannot_be_halved_is_refused(number: int, axes: list[str], message: str) -> None:
    fixed = {} if any("steps" in axis for axis in axes) else {"train.steps": 18}
    with pytest.raises(UserError, match=f"^--halving{' ' * message[0].isdigit()}{message}"):
        plan_rounds(experiment(TINY), fixed, cross([{}], parse_axes(axes)), number)


def test_variants_have_the_same_seeds() -> None:
    runs = [{"sparsity.rate": 0.1, "seed": 0}, *({"sparsity.rate": 0.2, "seed": s} for s in (0, 1))]
    with pytest.raises(UserError, match="have the seeds 0 and 0, 1; accepted: the same for all"):
        plan_rounds(experiment(TINY), {}, runs, 2)


def test_the_script_reuses_finished_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each run ends at once, at a perplexity of 10 plus its rate."""
    started = []

    class Ended:
        def is_alive(self) -> bool:
            return False

    def start(job: Job) -> Any:
        rate = job.config.sparsity.rate
        started.append((rate, job.config.train.steps))
        job.directory.mkdir(parents=True)
        rungs = SPARSE if rate else DENSE
        write_json(job.directory / "config.json", to_dict(job.config))
        summary = summary_of(10 + rate, 1.0, rungs, steps=job.config.train.steps)
        write_json(job.directory / "summary.json", summary)
        (job.directory / "metrics.jsonl").touch()
        return Ended()

    monkeypatch.setattr(Job, "start", start)
    monkeypatch.setattr("sat_jax.results.launch.Local.seconds", 0.0)
    monkeypatch.setattr("sat_jax.results.planned.prepare_all", prepared)
    line = ["sweep", f"--config={TINY}", f"--workdir={tmp_path / 'x'}", "--config.train.steps=8"]
    line += ["--axis", "sparsity.rate=0,0.5,0.25", "--halving=2"]
    line += ["--config.sparsity.metric=uniform"]
    monkeypatch.setattr("sys.argv", line)
    script.main()
    assert started == [(0.0, 4), (0.5, 4), (0.25, 4), (0.0, 8), (0.25, 8)]
    shown = capsys.readouterr()
    assert "sparsity.rate=0.25   10.250   10.250                    rank 1\n" in shown.out
    assert "successive halving: at most " in shown.err
    script.main()
    assert len(started) == 5
    monkeypatch.setattr("sys.argv", [*line, "--dry-run"])
    script.main()
    assert len(started) == 5 and "successive halving" in capsys.readouterr().out


def prepared(runs: Sequence[PlannedRun], _: Any) -> dict[str, str]:
    return {run.name: "d" * 20 for run in runs}
