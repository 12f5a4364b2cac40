"""Reports: which runs are compared, numbers of the tables, the page, and tables in documents."""

import csv
import dataclasses
import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from sat_jax.analysis.curves import curve_of
from sat_jax.analysis.results import record_run
from sat_jax.config import (
    Config,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    SparsityConfig,
    TrainConfig,
)
from sat_jax.config_values import fingerprint, to_dict
from sat_jax.errors import UserError
from sat_jax.report import figures
from sat_jax.report.axes import says_something, slices
from sat_jax.report.collect import collect
from sat_jax.report.groups import make_groups
from sat_jax.report.page import write_report
from sat_jax.report.records import Record, newest
from sat_jax.report.tables import Table, tables_of
from tests.test_tables import rung
from tests.tolerances import assert_close

DEVICE = {"platform": "gpu", "kind": "NVIDIA H200", "count": 1, "processes": 1, "host_cpus": 16}


PREPARED = {
    "splits": {"train": {"documents": 90, "useful_share": 0.87, "long_documents": 3},
               "held_out": {"documents": 10, "useful_share": 0.5, "long_documents": 1}},
    "left_out": {"without an answer": 2}, "form": {"format": "messages", "too_long": "drop"},
}  # fmt: skip


def config_of(seed: int, **changed: Any) -> Config:
    """`moments`, `schedule` and other settings of sparsity by name."""
    optimizer = {k: changed.pop(k) for k in ("moments", "bias_correction") if k in changed}
    model = ModelConfig(kernels=changed.pop("kernels", None))
    return Config(
        seed=seed,
        model=model,
        train=TrainConfig(eval_every=5 if changed.get("schedule") == "auto" else 0),
        optimizer=OptimizerConfig(**optimizer),
        sparsity=SparsityConfig(**changed),
    )


def summary_of(
    after: float, step: float, rungs: list[dict[str, Any]], **changed: Any
) -> dict[str, Any]:
    return {
        "steps": 8, "tokens": 4000, "loss_tokens": 4000, "perplexity_before": 20.0,
        "perplexity_after": after, "spent_flops": 8e9, "dense_flops": 1e10, "rungs": rungs,
        "selections": 2, "probes": 2, "compile_seconds": 5.0, "data": "d" * 20,
        "seconds": {"compile": 9.0, "data": 1.0, "step": step, "refresh": 0.5, "evaluate": 7.0,
                    "checkpoint": 0.5, "other": 3.0, "total": 21.0 + step},
        "prepared": PREPARED, "peak_memory": {"bytes": 2_000_000_000, "of": "device"},
        "versions": {"python": "3.11.7"}, "device": DEVICE, "commit": "a" * 40,
    } | changed  # fmt: skip


RECORDS = [
    {"step": 0, "eval_loss": 3.0},
    *(
        {"step": step, "loss": 4.0 - step / 4, "tokens": 500 * step, "seconds": 1.0,
         "tokens_per_second": 500.0, "flops_per_second": 1e9, "omission_rate": 0.5}
        for step in range(1, 8)
    ),
    {"step": 8, "loss": 2.0, "tokens": 4000, "seconds": 1.0, "tokens_per_second": 500.0,
     "flops_per_second": 1e9, "omission_rate": 0.0, "eval_loss": float("inf")},
]  # fmt: skip


def runs(tmp_path: Path, *given: tuple[Config, dict[str, Any]]) -> list[Record]:
    """As rows that were recorded and read again."""
    file = tmp_path / "rows.jsonl"
    for config, summary in given:
        record_run(file, "experiments/x.py", config, summary, RECORDS)
    return collect([], [file], print)


DENSE = [rung(0.0, 100.0)]
SPARSE = [rung(0.5, 150.0, tokens=3000), rung(0.0, 100.0, tokens=1000)]


def study(tmp_path: Path) -> list[Record]:
    return runs(
        tmp_path,
        (config_of(0), summary_of(10.0, 38.0, DENSE, spent_flops=1e10)),
        (config_of(1), summary_of(20.0, 38.0, DENSE, spent_flops=1e10)),
        (config_of(0, rate=0.4), summary_of(11.0, 18.0, SPARSE)),
        (config_of(1, rate=0.4), summary_of(24.0, 14.0, SPARSE)),
        (config_of(0, rate=0.2), summary_of(10.5, 18.0, SPARSE, commit="b" * 40)),
    )


def table(records: list[Record], name: str) -> Table:
    (found,) = [one for one in tables_of(make_groups(newest(records))) if one.name == name]
    return found


def test_numbers_of_the_quality_table(tmp_path: Path) -> None:
    """By hand: gaps 10 % and 20 %; times 40 s dense, 20 s and 16 s sparse."""
    rates = table(study(tmp_path), "rates")
    assert rates.header == (
        "rate", "seeds", "held-out perplexity before", "after", "from dense", "FLOPs", "whole run",
        "bound",
    )  # fmt: skip
    assert rates.texts == [
        ["dense", "2", "20.000", "15.000 ± 5.000", "-", "100 %", "-", "-"],
        ["0.2", "1", "20.000", "10.500", "+5.0 %", "80 %", "2.00×†", "1.25×"],
        ["0.4", "2", "20.000", "17.500 ± 6.500", "+15.0 % ± 5.0 %", "80 %",
         "2.25× ± 0.25×", "1.25×"],
    ]  # fmt: skip
    assert rates.notes == ["† The runs that this is made of are of several commits."]
    gap, whole = rates.rows[2][4], rates.rows[2][6]
    assert_close([gap.value, gap.error], [15.0, 5.0], "float64", "forward")
    assert_close([whole.value, whole.error], [2.25, 0.25], "float64", "forward")


def test_numbers_of_the_efficiency_table(tmp_path: Path) -> None:
    efficiency = table(study(tmp_path), "efficiency")
    assert efficiency.header[2:] == (
        "tokens/s", "time", "memory", "FLOPs", "of dense", "first rung", "bound", "whole run",
        "bound",
    )  # fmt: skip
    dense, at_4, at_2 = efficiency.texts
    assert dense[2:] == ["100 ± 0", "40.0 s ± 0.0 s", "2.00 GB", "10.00 GFLOP", "100 %", *"----"]
    assert at_4[2:] == [
        "150 ± 0", "18.0 s ± 2.0 s", "2.00 GB", "8.00 GFLOP", "80 %", "1.50× ± 0.00×", "1.33×",
        "2.25× ± 0.25×", "1.25×",
    ]  # fmt: skip
    assert at_2[-4:] == ["1.50×", "1.33×", "2.00×†", "1.25×"]


def test_dense_runs_alone_have_tables_and_a_page(tmp_path: Path) -> None:
    alone = study(tmp_path)[:2]
    assert table(alone, "rates").texts == [
        ["dense", "2", "20.000", "15.000 ± 5.000", "-", "100 %", "-", "-"]
    ]
    assert [row[0] for row in table(alone, "efficiency").texts] == ["dense"]
    assert "15.000 ± 5.000" in write_report(alone, tmp_path / "out")[0].read_text()


def test_a_speed_without_a_twin_is_told_as_estimated(tmp_path: Path) -> None:
    """3000 tokens at 150 and 1000 at 100 a second: 30 s, where dense steps take 40 s."""
    other = {**DEVICE, "kind": "TPU v5e"}
    records = runs(
        tmp_path,
        (config_of(0), summary_of(10.0, 38.0, DENSE, device=other)),
        (config_of(0, rate=0.4), summary_of(11.0, 18.0, SPARSE)),
        (config_of(0, rate=0.2), summary_of(11.0, 18.0, SPARSE[:1])),
        (config_of(1, rate=0.2), summary_of(11.0, 18.0, SPARSE[:1], device=other)),
    )
    rates = table(records, "rates")
    assert [row[-2] for row in rates.texts] == ["-", "-", "≈ 1.33×"]
    # Of two seeds at 0.2 one has a dense run: what is known of that is told, and that it is of it.
    assert [row[4].text for row in rates.rows] == ["-", "+10.0 %§", "+10.0 %"]
    assert "fewer pairs" in rates.notes[0] and "own dense rung" in rates.notes[1]
    efficiency = table(records, "efficiency")
    assert efficiency.rows[2][2].text == "150 ± 0‡" and "several devices" in efficiency.notes[0]
    assert efficiency.rows[2][7].text == "-"  # a dense rung of no run on the device of seed 0
    assert efficiency.rows[1][7].text == "1.50×"


def test_a_fine_tuning_table_says_how_full_rows_are(tmp_path: Path) -> None:
    tuned = dataclasses.replace(config_of(0), data=DataConfig(format="messages"))
    records = runs(tmp_path, (tuned, summary_of(10.0, 38.0, DENSE, loss_tokens=1000)))
    caption = table(records, "sft").caption
    assert "25 % of them learnt; 87 % of the slots useful; 100 examples, not as" in caption
    assert "were: 2 without an answer, 4 longer than a row (dropped); learning rate" in caption
    summary = summary_of(10.0, 38.0, DENSE, loss_tokens=1000)
    del summary["prepared"]  # as older versions wrote it
    (tmp_path / "older").mkdir()
    assert "slots" not in table(runs(tmp_path / "older", (tuned, summary)), "sft").caption
    assert "slots" not in table(study(tmp_path), "rates").caption


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
    """Two models and two budgets; rows name no folder, and sources by name alone."""
    start = config_of(0)
    models = [
        dataclasses.replace(
            start,
            model=ModelConfig(path=f"{folder}/huggingface"),
            data=DataConfig(sources=(f"{folder}/text.txt",)),
        )
        for folder in ("/a/runs/x", "/b/runs/x")
    ]
    budgets = [config_of(0, rate=0.4, budget=f"/{part}/budget.json") for part in "ab"]
    summary = summary_of(9.0, 38.0, DENSE)
    records = runs(tmp_path, *((config, summary) for config in (*models, *budgets, *models)))
    assert len(newest(records)) == len(records) == 4
    assert len({record.base for record in records[:2]}) == 2
    assert records[2].base == records[3].base
    names = [records[0].settings["model.path"], records[3].sparse["budget"]]
    assert [name.partition("#")[0] for name in names] == ["huggingface", "budget.json"]
    assert records[0].settings["data.sources"] == ["text.txt"]
    assert "/" not in "".join(names)


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
        "report.html", "tables.md", "tables.tex", "rates.csv", "efficiency.csv",
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
    assert "NVIDIA H200" in text and "aaaaaaaaaa (4 runs)" in text and "1 more was left" in text
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
