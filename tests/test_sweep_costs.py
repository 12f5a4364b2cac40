"""The cost of sweeps before they start, and the table at their end."""

from typing import Any, cast

from sat_jax.config_values import experiment
from sat_jax.results.planned import dry_run, plan_runs
from sat_jax.results.record import row_of
from sat_jax.results.rows import Row, latest, read
from sat_jax.results.tables import terminal_table
from sat_jax.train.costs import flops_of_probe, flops_of_selection
from sat_jax.train.counters import RunCounters
from sat_jax.train.finish import flops_of_run, rung_summaries
from tests.conftest import ROOT
from tests.result_runs import RECORDS, summary_of
from tests.test_sweep import runs_of
from tests.test_tables import rung
from tests.tolerances import assert_close


def test_costs_are_counted_from_shapes() -> None:
    runs = runs_of("sparsity.rate=0,0.5", "sparsity.metric=uniform,wanda,output")
    dense, uniform, wanda, output = runs
    assert [run.probes() for run in runs] == [0, 0, 1, 5]
    in_layers = {"sparsity.refresh_every": 0, "sparsity.probe_tokens": 1024}
    (dynamic,) = runs_of("sparsity.metric=wanda", fixed=in_layers)
    assert (dynamic.probes(), dynamic.flops()[0]) == (0, uniform.flops()[0])
    assert dense.flops()[0] == dense.flops()[1] == uniform.flops()[1]
    assert uniform.flops()[0] < wanda.flops()[0] < output.flops()[0] < dense.flops()[0]
    (more,) = runs_of("sparsity.metric=output", fixed={"sparsity.least_squares_correction": True})
    assert more.probes() == 5
    solved = [
        more.selections(rung) * flops_of_selection(more.config, more.model, rung)
        for rung in more.controller.rungs
    ]
    assert sum(more.selections(rung) for rung in more.controller.rungs) == 5
    products = more.probes() * (
        flops_of_probe(more.config, more.model) - flops_of_probe(output.config, output.model)
    )
    assert products > 0 and sum(solved) > 0
    difference = more.flops()[0] - output.flops()[0]
    assert_close(difference, products + sum(solved), "float64", "forward")
    # What a run is billed when it ends, which here has chosen and not trained.
    counters = RunCounters(more.controller)
    counters.rung_selections = [more.selections(rung) for rung in more.controller.rungs]
    assert_close(flops_of_run(cast(Any, more), counters)[0], sum(solved), "float64", "forward")
    # The quickstart's committed row: full rows are the most that its packed ones can be.
    rows = read(ROOT / "experiments/results/runs.jsonl")
    row = latest(rows, experiment="experiments/quickstart.py")
    assert row is not None
    fixed = {"model.path": None, "model.preset": "smollm2-135m"}
    (quick,) = plan_runs(experiment(str(ROOT / "experiments/quickstart.py")), fixed, [{}])
    assert quick.probes() == row["probes"]
    assert row["spent_flops"] <= quick.flops()[0] < 1.03 * row["spent_flops"]


def test_bounds_of_rungs_are_of_the_flops_that_a_run_is_billed() -> None:
    """Of mask execution none; of kernels with what they compute again."""
    fixed = {"sparsity.block": 64, "sparsity.metric": "uniform"}
    bounds = {}
    for run in runs_of("sparsity.execution=gather,mask,kernel", fixed=fixed):
        rungs = rung_summaries(cast(Any, run), RunCounters(run.controller), [], None)
        shares = [rung["steps"] / rung["bound"] for rung in rungs]
        share = sum(shares) / run.config.train.steps
        assert_close(share, run.flops()[0] / run.flops()[1], "float64", "forward")
        bounds[run.config.sparsity.execution] = rungs[0]["bound"]
    assert bounds["gather"] > bounds["kernel"] > bounds["mask"] == 1


def test_a_dry_run_shows_costs() -> None:
    runs = runs_of("sparsity.rate=0,0.5")
    shown = dry_run(runs, [runs[0].name]).splitlines()
    assert shown[2].split() == [
        runs[0].name, "sparsity.rate=0", "7.38", "GFLOP", "7.38", "GFLOP", "1.00×", "finished",
    ]  # fmt: skip
    assert shown[3].split()[-2:] == ["1.29×", "-"]
    assert shown[-1] == "2 runs, 1 to do: at most 5.73 GFLOP"


def finished(run: Any, after: float, **changed: Any) -> Row:
    rate = run.config.sparsity.rate
    rungs = [rung(rate, 150.0), rung(0.0, 100.0)] if rate else [rung(0.0, 100.0)]
    flops = {"spent_flops": 8e9 if rate else 1e10}
    summary = summary_of(after, 2 * after - 2, rungs, **flops, **changed)
    return {**row_of("x", run.config, summary, RECORDS), "date": ""}


def test_the_last_table_has_means_over_seeds() -> None:
    """Of the dense runs' time the sparse ones take 22 / 20 and 48 / 40."""
    runs = runs_of("sparsity.rate=0,0.5", "seed=0,1")
    results = [finished(run, after) for run, after in zip(runs, (10, 20, 11, 24), strict=True)]
    lines = [line.split("  ") for line in terminal_table(results).splitlines()]
    quality, cost = ([cell.strip() for cell in lines[n] if cell] for n in (3, 8))
    assert quality == ["r = 0.5", "2", "17.500 ± 6.500", "+15.0 % ± 5.0 %", "80 %"]
    assert cost[-2:] == ["0.87× ± 0.04×", "1.25×"]
    lines = [line.split("  ") for line in terminal_table(results[2:3]).splitlines()]
    assert [cell.strip() for cell in lines[2] if cell] == ["r = 0.5", "1", "11.000", "80 %"]


def test_runs_are_compared_with_the_dense_run_of_their_data() -> None:
    runs = runs_of("data.sources=README.md;CHANGELOG.md", "sparsity.rate=0,0.5")
    results = [
        finished(run, after, data=str(run.config.data.sources))
        for run, after in zip(runs, (10, 11, 20, 24), strict=True)
    ]
    table = terminal_table(results)
    assert "+10.0 %" in table and "+20.0 %" in table
