"""Groups and variants of finished runs, and what is measured of them, by hand."""

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sat_jax.config import Config, DataConfig, ModelConfig
from sat_jax.config_values import fingerprint, to_dict
from sat_jax.errors import UserError
from sat_jax.results.finished import FinishedRun, collect, finished_runs
from sat_jax.results.record import curve_of
from sat_jax.results.sweep import Comparison
from sat_jax.results.variants import PairedRun, Variant, make_groups, mean_of, part_means
from tests.result_runs import (
    DENSE,
    DEVICE,
    RECORDS,
    SPARSE,
    config_of,
    runs,
    study,
    summary_of,
)
from tests.tolerances import assert_close


def with_steps(config: Config, steps: int) -> Config:
    return dataclasses.replace(config, train=dataclasses.replace(config.train, steps=steps))


def finished(spent: float, after: float | None, rate: float = 0.0) -> FinishedRun:
    return FinishedRun({"spent_flops": spent, "perplexity_after": after, "rate": rate})


def at_equal_flops(spent: float, after: float | None, *dense: tuple[float, Any]) -> float | None:
    """Of a sparse run, beside dense runs of these FLOPs and perplexities."""
    row = finished(spent, after, rate=0.4).row
    return PairedRun(row, None, tuple(finished(*one) for one in dense)).difference_at_equal_flops()


def test_log_perplexity_is_interpolated_linearly_in_log_flops() -> None:
    """√(4 · 8) FLOPs are halfway between 4 and 8, and √(9 · 4) = 6 between 9 and 4."""
    dense = [(8.0, 4.0), (4.0, 9.0)]
    values = [at_equal_flops(math.sqrt(32.0), 6.6, *dense), at_equal_flops(4.0, 9.9, *dense)]
    # Lengths are whole steps: 0.5 % fewer FLOPs than the shortest run are compared with it.
    values.append(at_equal_flops(3.98, 9.9, *dense))
    assert_close(values, [10.0, 10.0, 10.0], "float64", "forward")


def test_unknown_differences_are_not_shown() -> None:
    dense = [(8.0, 4.0), (4.0, 9.0)]
    for spent in (3.9, 8.2):  # fewer and more FLOPs than all dense runs
        assert at_equal_flops(spent, 5.0, *dense) is None
    assert at_equal_flops(8.0, 5.0, dense[0]) is None
    for infinite in (
        at_equal_flops(5.0, None, *dense),
        at_equal_flops(5.0, 5.0, dense[0], (4.0, None)),
    ):
        assert infinite is not None and mean_of([1.0, infinite]) is None
    assert mean_of([1.0, None]) == (1.0, None, True) and mean_of([None]) is mean_of([]) is None


def each(variant: Variant, measure: Callable[[PairedRun], Any]) -> list[Any]:
    return [measure(run) for run in variant.runs]


def test_runs_are_paired_with_the_dense_baseline_of_their_seed(tmp_path: Path) -> None:
    """Differences 10 % and 20 %; 40 s dense, 20 s and 16 s sparse."""
    (group,) = make_groups(study(tmp_path))
    at_2, at_4 = group.sparse
    assert group.dense[0].is_baseline
    assert [variant.name for variant in group.variants] == ["dense", "r = 0.2", "r = 0.4"]
    assert_close(each(at_4, PairedRun.difference), [10.0, 20.0], "float64", "forward")
    assert each(at_4, PairedRun.speedup) == [(2.0, None, 1.25), (2.5, None, 1.25)]
    (other,) = each(at_2, PairedRun.speedup)
    assert math.isnan(other.speedup)  # at another commit than its baseline
    assert_close(each(at_4, PairedRun.flops_share), [80.0, 80.0], "float64", "forward")
    assert [run.seed for run in at_2.runs] == [0]


def test_a_baseline_on_another_device_gives_no_speedup(tmp_path: Path) -> None:
    other = {**DEVICE, "kind": "TPU v5e"}
    (group,) = make_groups(
        runs(
            tmp_path,
            (config_of(0), summary_of(10.0, 38.0, DENSE, device=other)),
            (config_of(0, rate=0.4), summary_of(11.0, 18.0, SPARSE)),
            (config_of(1, rate=0.4), summary_of(11.0, 18.0, SPARSE)),
        )
    )
    (sparse,) = group.sparse
    assert all(math.isnan(speedup.speedup) for speedup in each(sparse, PairedRun.speedup))
    assert_close(each(sparse, PairedRun.difference)[0], 10.0, "float64", "forward")
    assert each(sparse, PairedRun.difference)[1] is None


def shorter(tmp_path: Path) -> list[Any]:
    """Two seeds of dense training, one of them of two lengths, and SAT with the FLOPs of the
    shorter one."""
    half = summary_of(12.0, 18.0, DENSE, spent_flops=8e9, dense_flops=8e9, steps=6, tokens=3000)
    third = summary_of(14.0, 18.0, DENSE, spent_flops=4e9, dense_flops=4e9, steps=3, tokens=1500)
    return runs(
        tmp_path,
        (config_of(0), summary_of(10.0, 38.0, DENSE, spent_flops=1e10)),
        (config_of(1), summary_of(20.0, 38.0, DENSE, spent_flops=1e10)),
        (with_steps(config_of(0), 6), half),
        (with_steps(config_of(0), 3), third),
        (config_of(0, rate=0.4), summary_of(11.4, 18.0, SPARSE)),
        (config_of(1, rate=0.4), summary_of(22.0, 18.0, SPARSE)),
    )


def test_dense_runs_of_half_the_steps_and_more_belong_to_the_group(tmp_path: Path) -> None:
    """12 is 20 % from 10, and 11.4 is 5 % below 12; seed 1 has one length alone."""
    group, alone = make_groups(shorter(tmp_path))
    assert [variant.name for variant in group.variants] == ["dense", "dense, 6 steps", "r = 0.4"]
    (_, six), (sparse,) = group.dense, group.sparse
    assert_close(each(six, PairedRun.difference), [20.0], "float64", "forward")
    assert_close(each(six, PairedRun.flops_share), [80.0], "float64", "forward")
    known, missing = each(sparse, PairedRun.difference_at_equal_flops)
    assert_close(known, -5.0, "float64", "forward")
    assert missing is None
    assert [variant.name for variant in alone.variants] == ["dense"]  # of 3 steps


def names(records: list[Any]) -> list[str]:
    (group,) = make_groups(records)
    return [variant.name for variant in group.sparse]


def test_variants_are_named_by_their_difference_from_most(tmp_path: Path) -> None:
    settings: list[dict[str, Any]] = [
        {}, {"rate": 0.2}, {"metric": "svd"}, {"metric": "wanda", "selection": "sample"},
        {"refresh_every": 5}, {"rate_mlp": 0.0}, {"execution": "mask", "moments": "decay"},
        {"dense_layers": (0,), "block": 2},
    ]  # fmt: skip
    usual = {"rate": 0.4, "refresh_every": 8}
    records = runs(
        tmp_path,
        *((config_of(0, **(usual | one)), summary_of(9.0, 18.0, SPARSE)) for one in settings),
    )
    assert names(records) == [
        "r = 0.2", "r = 0.4", "r = 0.4, dense layers 0, block 2",
        "r = 0.4, execution mask, moments decay", "r = 0.4, metric svd",
        "r = 0.4, metric wanda, selection sample", "r = 0.4, rate mlp 0",
        "r = 0.4, refresh every 5",
    ]  # fmt: skip
    (group,) = make_groups(records)
    assert group.reference["sparsity.refresh_every"] == 8


def test_former_settings_have_their_recorded_names(tmp_path: Path) -> None:
    """A row without the setting, and one with it at the default that it had, are the same."""
    records = runs(
        tmp_path,
        *((config_of(seed, rate=0.4), summary_of(9.0, 18.0, SPARSE)) for seed in range(3)),
    )
    for row, recorded in zip(records, ({}, {"rescale": False}, {"rescale": True}), strict=True):
        row["sparsity"].pop("rescale", None)
        row["sparsity"] |= recorded
    assert names(records) == ["r = 0.4", "r = 0.4, rescale True"]


def test_a_newer_run_replaces_an_older_one(tmp_path: Path) -> None:
    old = (config_of(0), summary_of(10.0, 38.0, DENSE))
    records = runs(tmp_path, old, (config_of(0), summary_of(9.0, 38.0, DENSE)))
    assert [run.row for run in finished_runs(records)] == records[1:] and len(records) == 2
    assert len(finished_runs(runs(tmp_path, (config_of(1), old[1])))) == 2


def test_equal_names_in_different_places_are_told_apart(tmp_path: Path) -> None:
    start = config_of(0)
    configs = [
        dataclasses.replace(
            start,
            model=ModelConfig(path=f"{folder}/huggingface"),
            data=DataConfig(sources=(f"{folder}/text.txt",)),
        )
        for folder in ("/a/runs/x", "/b/runs/x")
    ]
    summary = summary_of(9.0, 38.0, DENSE)
    records = runs(tmp_path, *((config, summary) for config in [*configs, *configs]))
    kept = finished_runs(records)
    assert len({run.shared() for run in kept}) == len(kept) == len(records) == 2
    path = kept[0].settings["model.path"]
    assert path.partition("#")[0] == "huggingface" and "/" not in path
    assert kept[0].settings["data.sources"] == ["text.txt"]


def test_a_work_directory_and_its_row_are_equal(tmp_path: Path) -> None:
    config = config_of(2, rate=0.4, dense_layers=(0,))
    summary = summary_of(10.0, 18.0, SPARSE)
    name = fingerprint(config)
    for folder in (tmp_path / "sweep" / name, tmp_path / "sweep" / "unfinished"):
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps(to_dict(config)))
    (tmp_path / "sweep" / name / "summary.json").write_text(json.dumps(summary))
    lines = [json.dumps(r).replace("Infinity", "null") for r in RECORDS[:-1]]
    lines.append(json.dumps({**RECORDS[-1], "eval_loss": None, "nonfinite": {"eval_loss": "inf"}}))
    (tmp_path / "sweep" / name / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    table = {"name": "rates", "title": "Omission rate", "settings": ["sparsity.rate"]}
    contents = {"runs": {name: {}, "unfinished": {}}, "comparisons": [table]}
    (tmp_path / "sweep" / "sweep.json").write_text(json.dumps(contents))
    logged: list[str] = []
    (row,), comparisons = collect([tmp_path / "sweep"], logged.append)
    assert collect([tmp_path / "sweep" / name], print) == ([{**row, "experiment": name}], [])
    (recorded,) = runs(tmp_path, (config, summary))
    apart = {"experiment": "", "date": ""}
    assert {**row, **apart} == {**recorded, **apart}
    run = FinishedRun(row)
    assert comparisons == [Comparison("rates", "Omission rate", ("sparsity.rate",))]
    assert "unfinished" in logged[0] and run.seed == 2
    assert run.sparsity["sparsity.dense_layers"] == (0,)
    for wrong in (tmp_path, tmp_path / "none.jsonl"):
        with pytest.raises(UserError, match=f"{wrong} is neither a run's work directory"):
            collect([wrong], print)


def test_a_curve_has_few_points() -> None:
    curve = curve_of(RECORDS)
    assert curve["tokens"] == [500 * step for step in range(1, 8)] + [4000]
    assert curve["loss"][:2] == [3.75, 3.5] and curve_of([]) == {"tokens": [], "loss": []}
    many = [{**RECORDS[1], "step": n, "tokens": 100 * n, "loss": n} for n in range(1, 241)]
    many[-1]["loss"] = float("inf")
    curve = curve_of(many)
    assert curve["loss"][0] == 8.0 and curve["loss"][-1] is None and len(curve["loss"]) == 16
    assert part_means({"curve": {"tokens": [10, 20], "loss": [1.0, 2.0]}}, 3) == []
    uneven = part_means({"curve": {"tokens": [10, 30, 40], "loss": [1.0, 4.0, None]}}, 2)
    assert uneven[0] == 2.5 and math.isnan(uneven[1])  # 10 tokens at 1 and 10 at 4
