"""Dense runs of fewer steps: what training costs as much as a sparse run reaches without it."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest

from sat_jax.analysis.twins import gap_at_equal_flops
from sat_jax.config import Config
from sat_jax.errors import UserError
from sat_jax.report import figures
from sat_jax.report.figures import flops_figure
from sat_jax.report.groups import make_groups
from sat_jax.report.pictures import pictures
from sat_jax.report.records import Record
from sat_jax.report.tables import tables_of
from tests.report_runs import DENSE, SPARSE, config_of, runs, summary_of
from tests.test_report_figures import legends
from tests.tolerances import assert_close


def cost(spent: float, after: float | None) -> dict[str, Any]:
    return {"spent_flops": spent, "perplexity_after": after}


def test_between_two_lengths_log_perplexity_is_linear_in_log_flops() -> None:
    """By hand: √(4 · 8) FLOPs lie halfway between 4 and 8, and √(9 · 4) = 6 between 9 and 4."""
    dense = [cost(8.0, 4.0), cost(4.0, 9.0)]
    gap = gap_at_equal_flops(cost(math.sqrt(32.0), 6.6), dense)
    assert gap is not None
    assert_close(gap, 10.0, "float64", "forward")
    assert_close(gap_at_equal_flops(cost(4.0, 9.9), dense), 10.0, "float64", "forward")


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
def test_what_is_not_known_is_not_told(run: dict[str, Any], dense: list[dict[str, Any]]) -> None:
    assert gap_at_equal_flops(run, dense) is None


def test_steps_are_whole() -> None:
    """A run that costs half a per cent less than the shortest is held against that."""
    dense = [cost(8.0, 4.0), cost(4.0, 9.0)]
    assert_close(gap_at_equal_flops(cost(3.98, 9.9), dense), 10.0, "float64", "forward")


def shorter(config: Config, steps: int) -> Config:
    return dataclasses.replace(config, train=dataclasses.replace(config.train, steps=steps))


def study(tmp_path: Path) -> list[Record]:
    """Two seeds of dense training, one of them of two lengths, and SAT with the FLOPs of the
    shorter one."""
    half = summary_of(12.0, 18.0, DENSE, spent_flops=8e9, dense_flops=8e9, steps=6, tokens=3000)
    return runs(
        tmp_path,
        (config_of(0), summary_of(10.0, 38.0, DENSE, spent_flops=1e10)),
        (config_of(1), summary_of(20.0, 38.0, DENSE, spent_flops=1e10)),
        (shorter(config_of(0), 6), half),
        (config_of(0, rate=0.4), summary_of(11.4, 18.0, SPARSE)),
        (config_of(1, rate=0.4), summary_of(22.0, 18.0, SPARSE)),
    )


def test_a_table_has_them_as_rows_and_a_column(tmp_path: Path) -> None:
    """By hand: 12 is 20 % from 10, and 11.4 is 5 % below 12; seed 1 has one length alone."""
    rates, _, efficiency = tables_of(make_groups(study(tmp_path)))
    assert rates.header[4:6] == ("from dense", "at equal FLOPs")
    assert [row[:1] + row[4:] for row in rates.texts] == [
        ["dense", "-", "-", "100 %", "-", "-"],
        ["dense, 6 steps", "+20.0 %", "-", "80 %", "2.00×", "1.25×"],
        ["0.4", "+12.0 % ± 2.0 %", "-5.0 %§", "80 %", "2.00× ± 0.00×", "1.25×"],
    ]
    assert "8 steps, 4,000 tokens" in rates.caption
    assert [row[:1] + row[5:] for row in efficiency.texts] == [
        ["dense", "10.00 GFLOP", "100 %", "-", "-", "-", "-"],
        ["dense, 6 steps", "8.00 GFLOP", "80 %", "-", "-", "2.00×", "1.25×"],
        ["0.4", "8.00 GFLOP", "80 %", "1.50× ± 0.00×", "1.33×", "2.00× ± 0.00×", "1.25×"],
    ]


def test_they_are_a_group_where_there_is_no_longer_one(tmp_path: Path) -> None:
    alone = study(tmp_path)[2:3]
    (rates, _) = tables_of(make_groups(alone))
    assert [row[0] for row in rates.texts] == ["dense"]
    dense = study(tmp_path)[:3]
    (rates, _) = tables_of(make_groups(dense))
    assert [row[0] for row in rates.texts] == ["dense", "dense, 6 steps"]
    assert "at equal FLOPs" not in rates.header


def test_they_have_their_name_where_the_dense_run_is_missing(tmp_path: Path) -> None:
    """They are not what the others are held against."""
    some = study(tmp_path)[2:4]
    (rates, _) = tables_of(make_groups(some))
    assert [row[:1] + row[4:] for row in rates.texts] == [
        ["dense, 6 steps", "-", "-", "-", "-"],
        ["0.4", "-", "80 %", "≈ 1.33×", "1.25×"],
    ]


def test_the_front_has_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    *_, front, _ = legends(study(tmp_path), monkeypatch)
    assert set(front) == {"dense", "dense, 6 steps", "rate 0.4"}


def test_a_picture_joins_the_dense_runs(tmp_path: Path) -> None:
    """The line's ends are 80 % of the FLOPs, 20 % from dense, and the dense run; SAT lies below."""
    (group,) = make_groups(study(tmp_path))
    figure = flops_figure(group)
    assert figure is not None
    line, *_ = figure.axes[0].lines
    assert_close(line.get_xydata(), [[80.0, 20.0], [100.0, 0.0]], "float64", "forward")
    places = [bars.lines[0].get_xydata()[0] for bars in figure.axes[0].containers]
    assert_close(places, [[80.0, 20.0], [80.0, 12.0], [100.0, 0.0]], "float64", "forward")
    assert flops_figure(dataclasses.replace(group, sparse=())) is None


@pytest.mark.parametrize(("after", "scale"), [(12.0, "linear"), (16.0, "symlog")])
def test_what_is_close_remains_apart(tmp_path: Path, after: float, scale: str) -> None:
    """20 % from dense, and 60 %."""
    dense = (config_of(0), summary_of(10.0, 38.0, DENSE))
    records = runs(tmp_path, dense, (config_of(0, rate=0.4), summary_of(after, 18.0, SPARSE)))
    figure = flops_figure(*make_groups(records))
    assert figure is not None
    (axes,) = figure.axes
    assert axes.get_yscale() == scale
    bent = [tick for tick in axes.get_yticks() if tick > 10]
    assert (bent == [20.0, 50.0]) == ("logarithmic" in axes.get_ylabel()) == (scale == "symlog")


def test_points_of_fewer_seeds_are_hollow(tmp_path: Path) -> None:
    """Seed 1 has no run at 0.2, so that the mean over the dense run's seeds is no bound for it."""
    lone = (config_of(0, rate=0.2), summary_of(11.0, 18.0, SPARSE))
    (group,) = make_groups([*study(tmp_path), *runs(tmp_path, lone)])
    figure = flops_figure(group)
    assert figure is not None
    faces = [bars.lines[0].get_markerfacecolor() for bars in figure.axes[0].containers]
    assert [face == "white" for face in faces] == [True, False, True, False]
    assert sum("Hollow" in picture.words for picture in figures.pictures_of(group)) == 2
    (full,) = make_groups([run for run in group.runs if run.sparse.get("rate") != 0.2])
    assert not any("Hollow" in picture.words for picture in figures.pictures_of(full))


def test_documents_show_the_runs_that_most_are_held_against(tmp_path: Path) -> None:
    study(tmp_path)
    (tmp_path / "rows.jsonl").rename(tmp_path / "study.jsonl")
    assert pictures(tmp_path, tmp_path / "made") == [tmp_path / "made" / "study.png"]
    (tmp_path / "study.jsonl").write_text("")
    with pytest.raises(UserError, match="no sparse run with a dense one"):
        pictures(tmp_path, tmp_path / "made")
