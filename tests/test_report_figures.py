"""Pictures of reports: every curve has a name, and which points are joined."""

from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from sat_jax.report import figures
from sat_jax.report.groups import make_groups
from sat_jax.report.records import Record
from sat_jax.sparsity.importance import METRICS
from tests.report_runs import DENSE, SPARSE, config_of, runs, summary_of
from tests.test_tables import rung


def legends(
    records: list[Record], monkeypatch: pytest.MonkeyPatch, show: Path | None = None
) -> list[list[str]]:
    """What the legends of the pictures of one group say: losses three times, front, rates."""
    drawn: list[Figure] = []
    monkeypatch.setattr(figures, "svg", lambda figure: drawn.append(figure) or "")
    figures.pictures_of(*make_groups(records))
    for number, figure in enumerate(drawn if show else ()):
        figure.savefig(f"{show}-{number}.png")
    return [[text.get_text() for text in figure.legends[0].get_texts()] for figure in drawn]


def test_every_curve_has_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At one rate the default is named by what the others vary; of many curves it is one."""
    dense = (config_of(0), summary_of(10.0, 38.0, DENSE))
    pairs = [(m, s) for m in METRICS for s in ("topk", "sample") if (m, s) != ("uniform", "sample")]
    metrics = [config_of(0, rate=0.4, metric=m, selection=s) for m, s in pairs]
    records = runs(tmp_path, dense, *((one, summary_of(11.0, 18.0, SPARSE)) for one in metrics))
    loss, *_, front, _ = legends(records, monkeypatch)
    assert loss[0] == "dense" and len(loss) == 9
    best = [f"metric {m}, selection topk" for m in METRICS]
    assert set(loss) == {"dense", *best, "metric output, selection sample"}
    assert "metric output, selection topk" in front

    ladders: list[dict[str, Any]] = [
        {},
        {"rungs": 2},
        {"rungs": 2, "split": 0.25},
        {"metric": "svd"},
    ]
    (tmp_path / "rows.jsonl").unlink()
    records = runs(
        tmp_path,
        *(
            (config_of(0, rate=0.4, **one),
             summary_of(11.0, 18.0, [rung(0.4, 9.0, steps=n // 3), *SPARSE]))
            for n, one in zip((9, 7, 3, 10), ladders, strict=True)
        ),
    )  # fmt: skip
    loss, *_, rates = legends(records, monkeypatch)
    assert rates == [
        "ladder from 0.4, rungs 4, split 0.5", "ladder from 0.4, rungs 2, split 0.5",
        "ladder from 0.4, rungs 2, split 0.25",
    ]  # fmt: skip
    assert "metric output, rungs 2, split 0.25" in loss and len(set(loss)) == 4
    records = runs(
        tmp_path, (config_of(0, rate=0.4, metric="svd", refresh_every=5), summary_of(9, 18, SPARSE))
    )
    loss = legends(records, monkeypatch)[0]
    assert loss[0] == "metric output, rungs 4, split 0.5, refresh every 10"
    assert loss[1:3] == ["rungs 2", "rungs 2, split 0.25"]


def test_many_points_are_named_by_what_they_differ_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From most of them, whose settings are not the defaults; rates have their own names. A wide
    picture has room for more."""
    given: list[dict[str, Any]] = [
        {}, {"rate": 0.2}, {"metric": "svd"}, {"metric": "wanda"}, {"refresh_every": 5},
        {"metric": "svd", "refresh_every": 5},
    ]  # fmt: skip
    usual = {"rate": 0.4, "refresh_every": 8}
    records = runs(
        tmp_path,
        (config_of(0), summary_of(10.0, 38.0, DENSE)),
        *((config_of(0, **(usual | one)), summary_of(11.0, 18.0, SPARSE)) for one in given),
    )
    monkeypatch.setattr(figures, "_MANY_POINTS", 5)
    (group,) = make_groups(records)

    def names(width: float) -> list[str]:
        figure = figures.flops_figure(group, width)
        assert figure is not None
        return list(figure.axes[0].get_legend_handles_labels()[1])

    assert names(5.2) == [
        "rate 0.4, metric output, refresh every 8", "rate 0.2, metric output, refresh every 8",
        "Metric and selection", "Refreshes and their probes", "Several of these", "dense",
    ]  # fmt: skip
    assert len(names(15.6)) == len(given) + 1


def test_rates_of_heads_and_channels_are_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense = (config_of(0), summary_of(10.0, 38.0, DENSE))
    settings: list[dict[str, Any]] = [{}, {"rate_mlp": 0.0}, {"metric": "svd"}]
    sparse = [(config_of(0, rate=0.4, **one), summary_of(11.0, 18.0, SPARSE)) for one in settings]
    sparse.append((config_of(0, rate=0.2), summary_of(11.0, 18.0, SPARSE)))
    loss, *_ = legends(runs(tmp_path, dense, *sparse), monkeypatch)
    assert "rate 0.4 of heads, 0 of channels, metric output" in loss


def test_the_front_is_what_nothing_beats_in_both() -> None:
    assert figures.front([(1.0, 0.0), (1.2, 3.0), (1.3, 2.0), (1.5, 5.0), (1.4, 5.0)]) == [0, 2, 3]
