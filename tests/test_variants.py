"""Groups and variants of finished runs, and what is measured of them, by hand."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest

from sat_jax.config import Config, DataConfig, ModelConfig
from sat_jax.config_values import fingerprint, to_dict
from sat_jax.errors import UserError
from sat_jax.results.curves import curve_of, part_means
from sat_jax.results.finished import collect, newest
from sat_jax.results.sweep import Comparison
from sat_jax.results.variants import difference_at_equal_flops, make_groups
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


def cost(spent: float, after: float | None) -> dict[str, Any]:
    return {"spent_flops": spent, "perplexity_after": after}


def with_steps(config: Config, steps: int) -> Config:
    return dataclasses.replace(config, train=dataclasses.replace(config.train, steps=steps))


def test_log_perplexity_is_interpolated_linearly_in_log_flops() -> None:
    """√(4 · 8) FLOPs are halfway between 4 and 8, and √(9 · 4) = 6 between 9 and 4."""
    dense = [cost(8.0, 4.0), cost(4.0, 9.0)]
    values = [difference_at_equal_flops(cost(math.sqrt(32.0), 6.6), dense)]
    values.append(difference_at_equal_flops(cost(4.0, 9.9), dense))
    # Lengths are whole steps: 0.5 % fewer FLOPs than the shortest run are compared with it.
    values.append(difference_at_equal_flops(cost(3.98, 9.9), dense))
    assert_close(values, [10.0, 10.0, 10.0], "float64", "forward")


@pytest.mark.parametrize(
    ("run", "dense"),
    [
        (cost(3.9, 5.0), [cost(8.0, 4.0), cost(4.0, 9.0)]),
        (cost(8.2, 5.0), [cost(8.0, 4.0), cost(4.0, 9.0)]),
        (cost(5.0, None), [cost(8.0, 4.0), cost(4.0, 9.0)]),
        (cost(5.0, 5.0), [cost(8.0, 4.0), cost(4.0, None)]),
        (cost(5.0, 5.0), []),
    ],
)
def test_unknown_differences_are_none(run: dict[str, Any], dense: list[dict[str, Any]]) -> None:
    assert difference_at_equal_flops(run, dense) is None


def test_runs_are_paired_with_the_dense_baseline_of_their_seed(tmp_path: Path) -> None:
    """Differences 10 % and 20 %; 40 s dense, 20 s and 16 s sparse."""
    (group,) = make_groups(study(tmp_path))
    at_2, at_4 = group.sparse
    assert group.dense[0].is_baseline
    assert [variant.name for variant in group.variants] == ["dense", "r = 0.2", "r = 0.4"]
    assert_close(at_4.differences(), [10.0, 20.0], "float64", "forward")
    speedup, bound = at_4.speedup_and_bound()
    assert speedup is not None and bound is not None
    assert_close([*speedup, bound.value], [2.25, 0.25, 1.25], "float64", "forward")
    assert at_2.speedup_and_bound()[0] is None  # at another commit than its baseline
    assert_close(at_4.flops_shares(), [80.0, 80.0], "float64", "forward")
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
    assert group.sparse[0].speedup_and_bound()[0] is None
    assert_close(group.sparse[0].differences(), [10.0], "float64", "forward")  # of one seed


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
    assert_close(six.differences(), [20.0], "float64", "forward")
    assert_close(six.flops_shares(), [80.0], "float64", "forward")
    assert_close(sparse.differences_at_equal_flops(), [-5.0], "float64", "forward")
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
    for run, recorded in zip(records, ({}, {"rescale": False}, {"rescale": True}), strict=True):
        run.row["sparsity"].pop("rescale", None)
        run.row["sparsity"] |= recorded
    assert names(records) == ["r = 0.4", "r = 0.4, rescale True"]


def test_a_newer_run_replaces_an_older_one(tmp_path: Path) -> None:
    old = (config_of(0), summary_of(10.0, 38.0, DENSE))
    records = runs(tmp_path, old, (config_of(0), summary_of(9.0, 38.0, DENSE)))
    assert len(records) == 2 and newest(records) == records[1:]
    assert len(newest(runs(tmp_path, (config_of(1), old[1])))) == 2


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
    assert len(newest(records)) == len(records) == 2
    assert len({record.shared() for record in records}) == 2
    path = records[0].settings["model.path"]
    assert path.partition("#")[0] == "huggingface" and "/" not in path
    assert records[0].settings["data.sources"] == ["text.txt"]


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
    (run,), _, comparisons = collect([tmp_path / "sweep"], [], logged.append)
    (recorded,) = runs(tmp_path, (config, summary))
    apart = {"experiment": "", "date": ""}
    assert {**run.row, **apart} == {**recorded.row, **apart}
    assert run.row["prepared"] == {
        "useful_share": 0.87, "documents": 100, "left_out": {"without an answer": 2},
        "long_documents": 4, "too_long": "drop",
    }  # fmt: skip
    assert comparisons == [Comparison("rates", "Omission rate", ("sparsity.rate",))]
    assert "unfinished" in logged[0] and run.seed == 2
    assert run.sparsity["sparsity.dense_layers"] == (0,)
    with pytest.raises(UserError, match="neither a run's work directory"):
        collect([tmp_path], [], print)
    (tmp_path / "none.jsonl").write_text("")
    with pytest.raises(UserError, match="no finished run and no evaluation"):
        collect([], [tmp_path / "none.jsonl"], print)


def test_a_curve_has_few_points() -> None:
    curve = curve_of(RECORDS)
    assert curve["tokens"] == [500.0 * step for step in range(1, 8)] + [4000.0]
    assert curve["loss"][:2] == [3.75, 3.5] and curve["rate"] == [*[0.5] * 7, 0.0]
    assert (curve["eval_tokens"], curve["eval_loss"]) == ([0.0, 4000.0], [3.0, None])
    many = [{**RECORDS[1], "step": n, "tokens": 100 * n, "loss": n} for n in range(1, 241)]
    curve = curve_of(many)
    assert curve["loss"][0] == 8.0 and len(curve["loss"]) == 16
    assert part_means({"tokens": [10, 20], "loss": [1.0, 2.0]}, 3) == []
    uneven = part_means({"tokens": [10, 30, 40], "loss": [1.0, 4.0, None]}, 2)
    assert uneven == [2.5, None]  # 10 tokens at 1 and 10 at 4; then a loss that is not finite
