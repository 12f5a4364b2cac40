"""Reports: which runs are compared, numbers of the tables, the page, and tables in documents."""

import csv
import dataclasses
import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from sat_jax.analysis.curves import curve_of
from sat_jax.config import (
    DataConfig,
    ModelConfig,
)
from sat_jax.config_values import fingerprint, to_dict
from sat_jax.errors import UserError
from sat_jax.report import figures
from sat_jax.report.axes import says_something, slices
from sat_jax.report.collect import collect
from sat_jax.report.groups import make_groups
from sat_jax.report.page import write_report
from sat_jax.report.records import Record, newest
from sat_jax.report.tables import tables_of
from tests.report_runs import DENSE, RECORDS, SPARSE, config_of, runs, study, summary_of, table
from tests.tolerances import assert_close


def compared(records: list[Record]) -> dict[str, list[tuple[Any, ...]]]:
    (group,) = make_groups(records)
    return {
        one.axis.name: [tuple(v.settings[key] for key in one.varied) for v in one.variants]
        for one in slices(group)
    }


def test_runs_are_compared_by_what_differs(tmp_path: Path) -> None:
    settings: list[dict[str, Any]] = [
        {}, {"rate": 0.2}, {"rate": 0.4}, {"rate": 0.4, "metric": "wanda"},
        {"rate": 0.4, "metric": "wanda", "selection": "sample"},
        {"rate": 0.4, "schedule": "auto"}, {"rate": 0.4, "refresh_every": 5},
        {"rate": 0.4, "rate_mlp": 0.0}, {"rate": 0.4, "execution": "mask"},
        {"rate": 0.4, "execution": "mask", "moments": "decay"},
        {"rate": 0.4, "bias_correction": "global"},
        {"rate": 0.6, "dense_layers": (0,), "block": 2},
    ]  # fmt: skip
    records = runs(
        tmp_path,
        *(
            (config_of(0, **one), summary_of(9.0, 18.0, SPARSE if one else DENSE))
            for one in settings
        ),
    )
    assert compared(records) == {
        # The last is compared with none, so it stands in the first table.
        "rates": [(0.2, (), 1), (0.4, (), 1), (0.6, (0,), 2)],
        "metrics": [("output", "topk"), ("wanda", "topk"), ("wanda", "sample")],
        "schedules": [("ladder",), ("auto",)],
        "refresh": [(5,), (10,)],
        "modules": [(0.0,), (None,)][::-1],
        "moments": [
            ("freeze", "neuron", "gather"), ("freeze", "neuron", "mask"),
            ("decay", "neuron", "mask"), ("freeze", "global", "gather"),
        ],
    }  # fmt: skip
    crossed = [r for r in records if not r.dense][:2]
    assert compared(crossed) == {"rates": [(0.2,), (0.4,)]}
    assert [row[0] for row in table(records, "modules").texts] == ["dense", "0.4", "0"]
    efficiency = table(records, "efficiency")
    assert efficiency.header[:3] == ("rate", "settings", "seeds")
    assert [row[1] for row in efficiency.texts][:4] == ["", "", "", "metric wanda"]
    assert efficiency.texts[-1][:2] == ["0.6", "dense layers 0, block 2"]


def test_settings_without_effect_are_not_shown(tmp_path: Path) -> None:
    """What only `auto` looks at, and where stairs begin, which says nothing to `constant`."""
    settings: list[dict[str, Any]] = [
        {"schedule": "ladder"}, {"schedule": "auto", "min_gain": 0.02},
        {"schedule": "s2d", "split": 0.25}, {"schedule": "constant"},
    ]  # fmt: skip
    records = runs(
        tmp_path,
        *((config_of(0, rate=0.4, **one), summary_of(9.0, 18.0, SPARSE)) for one in settings),
    )
    schedules = table(records, "schedules")
    assert schedules.header[:3] == ("schedule", "split", "min gain")
    assert sorted(row[:3] for row in schedules.texts) == [
        ["auto", "0.5", "0.02"], ["constant", "", ""], ["ladder", "0.5", ""], ["s2d", "0.25", ""],
    ]  # fmt: skip
    (tmp_path / "rows.jsonl").unlink()
    metrics: list[dict[str, Any]] = [
        {"refresh_every": 1, "probe_tokens": 64}, {"metric": "maxip"},
        {"metric": "maxip", "refresh_every": 0},
    ]  # fmt: skip
    records = runs(
        tmp_path,
        *((config_of(0, rate=0.4, **one), summary_of(9.0, 18.0, SPARSE)) for one in metrics),
    )
    refresh = table(records, "refresh")
    assert refresh.header[:2] == ("refresh every", "seeds")
    assert says_something(records[0].sparse, "probe_tokens")
    assert not any(says_something(one.sparse, "probe_tokens") for one in records[1:])


def test_runs_are_compared_by_their_kernels(tmp_path: Path) -> None:
    """A setting of the model that matters only with sparsity: one dense twin for all."""
    blocks = {"rate": 0.4, "block": 64}
    settings: list[dict[str, Any]] = [
        {}, blocks, {**blocks, "execution": "kernel"},
        {**blocks, "execution": "kernel", "kernels": "xla"},
    ]  # fmt: skip
    records = runs(
        tmp_path, *((config_of(0, **one), summary_of(9.0, 18.0, SPARSE)) for one in settings)
    )
    assert len({record.row["twin"] for record in records}) == 1
    assert compared(records) == {"moments": [("gather", None), ("kernel", None), ("kernel", "xla")]}


def test_a_newer_run_stands_for_an_older_one(tmp_path: Path) -> None:
    old = (config_of(0), summary_of(10.0, 38.0, DENSE))
    records = runs(tmp_path, old, (config_of(0), summary_of(9.0, 38.0, DENSE)))
    assert len(records) == 2 and newest(records) == records[1:]
    assert len(newest(runs(tmp_path, (config_of(1), old[1])))) == 2


def test_what_is_called_the_same_elsewhere_is_another(tmp_path: Path) -> None:
    """Two models; rows name no folder, and sources by name alone."""
    start = config_of(0)
    models = [
        dataclasses.replace(
            start,
            model=ModelConfig(path=f"{folder}/huggingface"),
            data=DataConfig(sources=(f"{folder}/text.txt",)),
        )
        for folder in ("/a/runs/x", "/b/runs/x")
    ]
    summary = summary_of(9.0, 38.0, DENSE)
    records = runs(tmp_path, *((config, summary) for config in (*models, *models)))
    assert len(newest(records)) == len(records) == 2
    assert len({record.base for record in records}) == 2
    name = records[0].settings["model.path"]
    assert name.partition("#")[0] == "huggingface"
    assert records[0].settings["data.sources"] == ["text.txt"]
    assert "/" not in name


def test_a_work_directory_and_its_row_say_the_same(tmp_path: Path) -> None:
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
    asked = {"runs": {name: {}, "unfinished": {}}}
    (tmp_path / "sweep" / "sweep.json").write_text(json.dumps(asked))
    told: list[str] = []
    (record,) = collect([tmp_path / "sweep"], [], told.append)
    (row,) = runs(tmp_path, (config, summary))
    apart = {"experiment": "", "date": ""}
    assert {**record.row, **apart} == {**row.row, **apart}
    assert record.place == tmp_path / "sweep" / name and "unfinished" in told[0]
    assert record.seed == 2 and record.sparse["dense_layers"] == (0,)
    with pytest.raises(UserError, match="neither a run's work directory"):
        collect([tmp_path], [], print)


def test_a_curve_ends_at_what_the_run_cost() -> None:
    """Eight equal steps of 8 GFLOP and 20 s of training in all."""
    curve = curve_of(RECORDS, summary_of(10.0, 18.0, SPARSE))
    assert curve["flops"] == [1e9, 2e9, 3e9, 4e9, 5e9, 6e9, 7e9, 8e9]
    assert curve["seconds"] == [2.5, 5.0, 7.5, 10.0, 12.5, 15.0, 17.5, 20.0]
    assert curve["loss"][:2] == [3.75, 3.5] and curve["rate"] == [*[0.5] * 7, 0.0]
    assert (curve["eval_seconds"], curve["eval_loss"]) == ([0.0, 20.0], [3.0, None])
    many = [{**RECORDS[1], "step": n, "tokens": 100 * n, "loss": n} for n in range(1, 241)]
    curve = curve_of(many, summary_of(10.0, 18.0, SPARSE))
    assert curve["loss"][0] == 8.0 and len(curve["loss"]) == 16


def test_a_rate_is_told_as_it_is_asked(tmp_path: Path) -> None:
    settings: list[dict[str, Any]] = [
        {"rate_mlp": 0.4}, {"rate": 0.2, "rate_mlp": 0.2},
        {"layer_rates_attention": (0.1, 0.3), "rate_mlp": 0.3}, {"rate": 0.3},
    ]  # fmt: skip
    records = runs(
        tmp_path, *((config_of(0, **one), summary_of(9.0, 18.0, SPARSE)) for one in settings)
    )
    rates = [row[0] for row in table(records, "efficiency").rows]
    assert [rate.text for rate in rates] == [
        "0 of heads, 0.4 of channels", "0.2", "0.1 to 0.3 of heads, 0.3 of channels", "0.3",
    ]  # fmt: skip
    assert [rate.value for rate in rates] == [None, 0.2, None, 0.3]
    (alone,) = make_groups(records[:1])
    assert figures.label(alone, alone.sparse[0]) == "rate 0 of heads, 0.4 of channels"


class Page(HTMLParser):
    """Checks that elements nest, and collects what refers elsewhere and what cells hold."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.ids: list[str] = []
        self.cells: list[str] = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("href", "src")]
        self.ids += [value or "" for name, value in attrs if name == "id"]
        if tag in ("td", "th"):
            self.cells.append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("td", "th"):
            self.cells[-1] += data


def test_the_page_needs_nothing_else_and_has_every_number(tmp_path: Path) -> None:
    records = study(tmp_path)
    out = tmp_path / "out"
    written = write_report([*records, records[0]], out)
    assert [path.name for path in written] == [
        "report.html", "tables.md", "tables.tex", "rates.csv", "losses.csv", "efficiency.csv",
    ]  # fmt: skip
    text = (out / "report.html").read_text()
    assert "http" not in text and "url(" not in text and "@import" not in text
    page = Page(text)
    images = [link for link in page.links if link.startswith("data:image/svg+xml;base64,")]
    assert len(images) == 6
    assert {link[1:] for link in page.links if link not in images} == set(page.ids)
    tables = tables_of(make_groups(records))
    expected = [
        cell for one in tables for row in (one.header, *one.texts) for cell in row
    ]  # fmt: skip
    assert page.cells == expected
    assert "NVIDIA H200" in text and "aaaaaaaaaa (4 of 5)" in text and "1 more was left" in text
    for row in tables[0].texts:
        assert [cell.strip() for cell in row] in [
            [cell.strip() for cell in line.strip("|").split("|")]
            for line in (out / "tables.md").read_text().splitlines()
        ]
    latex = (out / "tables.tex").read_text()
    assert r"0.4 & 2 & 20.000 & 17.500 $\pm$ 6.500 & +15.0 \% $\pm$ 5.0 \% &" in latex
    header, *lines = csv.reader((out / "efficiency.csv").read_text().splitlines())
    line = dict(zip(header, lines[1], strict=True))
    names = ("whole run", "whole run error", "first rung bound", "whole run bound")
    numbers = [float(line[name]) for name in names]
    assert_close(numbers, [2.25, 0.25, 4 / 3, 1.25], "float64", "forward")
