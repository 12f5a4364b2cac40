"""What sweeps cost, before they start, and the table at their end."""

import re
from pathlib import Path
from typing import Any, cast

from sat_jax.analysis.means import mean_and_error
from sat_jax.analysis.rows import latest, read
from sat_jax.config_values import experiment
from sat_jax.sweep.estimate import (
    Speed,
    cost_of,
    dry_run,
    probes_of,
    selections_of,
    speed_of,
)
from sat_jax.sweep.report import report
from sat_jax.sweep.runs import make_runs
from sat_jax.train.costs import flops_of_probe, flops_of_selection
from sat_jax.train.counters import RunCounters
from sat_jax.train.finish import flops_of_run, rung_summaries
from tests.conftest import ROOT
from tests.test_sweep import runs_of
from tests.tolerances import assert_close


def test_costs_are_counted_from_shapes() -> None:
    dense, uniform, wanda, output = runs_of(
        "sparsity.rate=0,0.5", "sparsity.metric=uniform,wanda,output"
    )
    assert [probes_of(run) for run in (dense, uniform, wanda, output)] == [0, 0, 1, 5]
    in_layers = {"sparsity.refresh_every": 0, "sparsity.probe_tokens": 1024}
    (dynamic,) = runs_of("sparsity.metric=wanda", fixed=in_layers)
    assert (probes_of(dynamic), cost_of(dynamic).spent) == (0, cost_of(uniform).spent)
    costs = [cost_of(run) for run in (dense, uniform, wanda, output)]
    assert costs[0].spent == costs[0].dense == costs[1].dense > costs[3].spent
    assert costs[1].spent < costs[2].spent < costs[3].spent
    (more,) = runs_of("sparsity.metric=output", fixed={"sparsity.least_squares_correction": True})
    assert probes_of(more) == 5
    solved = [
        selections_of(more, rung) * flops_of_selection(more.config, more.model, rung)
        for rung in more.controller.rungs
    ]
    assert sum(selections_of(more, rung) for rung in more.controller.rungs) == 5
    products = probes_of(more) * (
        flops_of_probe(more.config, more.model) - flops_of_probe(output.config, output.model)
    )
    assert products > 0 and sum(solved) > 0
    assert_close(cost_of(more).spent - costs[3].spent, products + sum(solved), "float64", "forward")
    # What a run is billed when it ends, which here has chosen and not trained.
    counters = RunCounters(more.controller)
    counters.rung_selections = [selections_of(more, rung) for rung in more.controller.rungs]
    assert_close(flops_of_run(cast(Any, more), counters)[0], sum(solved), "float64", "forward")
    # The quickstart's committed row: full rows are the most that its packed ones can be.
    rows = read(ROOT / "experiments/results/runs.jsonl")
    row = latest(rows, experiment="experiments/quickstart.py")
    assert row is not None
    fixed = {"model.path": None, "model.preset": "smollm2-135m"}
    ((quick,), _) = make_runs(experiment(str(ROOT / "experiments/quickstart.py")), fixed, [{}])
    assert probes_of(quick) == row["probes"]
    assert row["spent_flops"] <= cost_of(quick).spent < 1.03 * row["spent_flops"]


def test_bounds_of_rungs_are_of_the_flops_that_a_run_is_billed() -> None:
    """Of mask execution none; of kernels with what they compute again."""
    fixed = {"sparsity.block": 64, "sparsity.metric": "uniform"}
    bounds = {}
    for run in runs_of("sparsity.execution=gather,mask,kernel", fixed=fixed):
        rungs = rung_summaries(cast(Any, run), RunCounters(run.controller), [])
        shares = [rung["steps"] / rung["bound"] for rung in rungs]
        cost = cost_of(run)
        share = sum(shares) / run.config.train.steps
        assert_close(share, cost.spent / cost.dense, "float64", "forward")
        bounds[run.config.sparsity.execution] = rungs[0]["bound"]
    assert bounds["gather"] > bounds["kernel"] > bounds["mask"] == 1


def test_a_dry_run_tells_runs_costs_and_where_the_time_is_from(tmp_path: Path) -> None:
    runs = runs_of("sparsity.rate=0,0.5")
    shown = dry_run(runs, [runs[0].name], Speed(1e9, "a test"))
    assert shown.splitlines()[2].split() == [
        runs[0].name, "rate=0.0", "7.38", "GFLOP", "7.38", "GFLOP", "1.00x", "finished",
    ]  # fmt: skip
    assert "5.7 s" in shown.splitlines()[3]
    assert "2 runs, 1 to do: at most 5.72 GFLOP, 5.7 s one after another" in shown
    assert shown.endswith("at 1.00 GFLOP/s, from a test")
    assert dry_run(runs, [], None).endswith("give --flops-per-second")
    measured = speed_of([{"spent_flops": 6e9, "seconds": {"total": 3.0}}], runs, tmp_path)
    assert measured == Speed(2e9, "1 finished of this sweep")
    committed = speed_of([], runs, ROOT / "experiments/results/benchmark.jsonl")
    assert committed is not None and "smollm2-135m in float32" in committed.source
    assert speed_of([], runs, tmp_path / "none.jsonl") is None


def summary(after: float, rate: float) -> dict[str, Any]:
    parts = [(rate, 150.0), (0.0, 100.0)] if rate else [(0.0, 100.0)]
    rungs = [
        {"kept_heads": 1 - r, "kept_channels": 1 - r, "tokens": 100, "steps_timed": 5,
         "tokens_per_second": speed}
        for r, speed in parts
    ]  # fmt: skip
    seconds = {"data": 0.0, "step": 2 * after, "refresh": 0.0, "checkpoint": 0.0}
    device = {"platform": "gpu", "kind": "NVIDIA H200", "count": 1}
    return {
        "perplexity_after": after, "rungs": rungs, "seconds": seconds, "device": device,
        "data": "fingerprint",
    }  # fmt: skip


def test_the_last_table_has_means_over_seeds() -> None:
    runs = runs_of("sparsity.rate=0,0.5", "seed=0,1")
    after = [10.0, 20.0, 11.0, 24.0]
    ended = [
        (run, summary(value, run.config.sparsity.rate))
        for run, value in zip(runs, after, strict=True)
    ]
    lines = report(ended).splitlines()
    assert lines[2].split() == ["rate=0.0", "2", "15.000", "±", "5.000", "-", "-", "-"]
    # The whole run by the dense runs' time: 20 / 22 and 40 / 48 of it.
    assert lines[3].split("  ")[-3:] == ["+15.0 % ± 5.0 %", "1.50x ± 0.00x", "0.87x ± 0.04x"]
    assert len(lines) == 4
    lines = report(ended[2:3]).splitlines()
    assert lines[2].split() == ["rate=0.5", "1", "11.000", "-", "1.50x", "≈", "1.20x"]
    assert lines[3].startswith("≈ Estimated from the run's own dense rung")
    one_pair = report(ended[1:]).splitlines()[3].split("  ")
    assert [cell.strip() for cell in one_pair[-3:]] == [
        "+20.0 %§", "1.50x ± 0.00x", "≈ 1.20x ± 0.00x",
    ]  # fmt: skip
    assert mean_and_error([1.0, None], "{}") == mean_and_error([], "{}") == "-"


def test_runs_are_compared_with_the_dense_run_of_their_data() -> None:
    runs = runs_of("data.sources=README.md;CHANGELOG.md", "sparsity.rate=0,0.5")
    after = [10.0, 11.0, 20.0, 24.0]
    ended = [
        (run, summary(value, run.config.sparsity.rate) | {"data": str(run.config.data.sources)})
        for run, value in zip(runs, after, strict=True)
    ]
    assert re.findall(r"\+\S+ %", report(ended)) == ["+10.0 %", "+20.0 %"]
