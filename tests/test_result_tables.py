"""Tables, sentences, figures and the page of a report."""

import dataclasses
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from sat_jax.config import Config, DataConfig, OptimizerConfig
from sat_jax.errors import UserError
from sat_jax.results.figures import quality_figure
from sat_jax.results.page import write_report
from sat_jax.results.speed import speedup_text
from sat_jax.results.sweep import Comparison
from sat_jax.results.tables import Table, across_tables, group_tables, quality_table, sentence
from sat_jax.results.variants import Group, make_groups
from tests.result_runs import DENSE, RATES, SPARSE, config_of, runs, study, summary_of
from tests.test_variants import shorter
from tests.tolerances import assert_close

METRICS = Comparison("metrics", "Metric", ("sparsity.metric", "sparsity.selection"))
LEARNING_RATES = Comparison("learning_rates", "Learning rate", ("optimizer.learning_rate",))


def table_of(group: Group, name: str) -> Table:
    (table,) = (table for table in group_tables(group, []) if table.name == name)
    return table


def test_numbers_of_the_quality_table(tmp_path: Path) -> None:
    (group,) = make_groups(study(tmp_path))
    table = quality_table([group])
    assert table.header == ("variant", "seeds", "perplexity", "from dense", "FLOPs")
    assert table.rows == (
        ("dense", "2", "15.000 ± 5.000", "-", "100 %"),
        ("r = 0.2", "1", "10.500", "+5.0 %", "80 %"),
        ("r = 0.4", "2", "17.500 ± 6.500", "+15.0 % ± 5.0 %", "80 %"),
    )
    assert "; perplexity before training 20.000; data dddddddd; " in table.caption


def test_difference_at_equal_flops_has_a_column(tmp_path: Path) -> None:
    group, _ = make_groups(shorter(tmp_path))
    table = quality_table([group])
    assert table.header[3:5] == ("from dense", "at equal FLOPs")
    assert table.rows[1:] == (
        ("dense, 6 steps", "1", "12.000", "+20.0 %", "-", "80 %"),
        ("r = 0.4", "2", "16.700 ± 5.300", "+12.0 % ± 2.0 %", "-5.0 %§", "80 %"),
    )
    assert "of fewer seeds" in table.notes[0]
    assert sentence(group.sparse[0]) == (
        "r = 0.4: perplexity +12.0 % ± 2.0 % from dense training on the same tokens (2 seeds), with"
        " 80 % of its FLOPs; -5.0 %§ at equal FLOPs."
    )
    # Only comparisons of the rate have dense runs of fewer steps.
    other, *_ = group_tables(group, [METRICS])
    assert [row[0] for row in other.rows] == ["dense", "r = 0.4"]


def test_numbers_of_the_cost_table(tmp_path: Path) -> None:
    (group,) = make_groups(study(tmp_path))
    table = table_of(group, "cost")
    assert table.rows[0][2:] == ("40.0 s ± 0.0 s", "2.00 GB", "10.00 GFLOP", "100 %", "-", "-")
    # None at another commit than the dense baseline; 2.25× ± 0.25×, where FLOPs allow 1.25×.
    assert table.rows[1][-2:] == ("-", "1.25×")
    assert table.rows[2][2:] == (
        "18.0 s ± 2.0 s", "2.00 GB", "8.00 GFLOP", "80 %", "2.25× ± 0.25×‡", "1.25×",
    )  # fmt: skip
    assert [note[0] for note in table.notes] == ["‡"]


def test_a_speedup_is_above_its_bound_by_more_than_its_error() -> None:
    assert speedup_text(1.28, 1.25) == "1.28×‡"
    assert speedup_text(1.28, 1.25, 0.02) == "1.28× ± 0.02×‡"
    assert speedup_text(1.28, 1.25, 0.03) == "1.28× ± 0.03×"
    assert speedup_text(1.254, 1.25) == "1.25×"  # equal as shown
    assert speedup_text(1.28, None) == "1.28×"


def test_variants_are_in_the_tables_of_the_comparisons_that_declare_them(tmp_path: Path) -> None:
    settings: list[dict[str, Any]] = [
        {}, {"rate": 0.2}, {"metric": "wanda"}, {"metric": "wanda", "selection": "sample"},
        {"block": 2},
    ]  # fmt: skip
    records = runs(
        tmp_path,
        (config_of(0), summary_of(10.0, 38.0, DENSE)),
        *(
            (config_of(0, **({"rate": 0.4} | one)), summary_of(11.0, 18.0, SPARSE))
            for one in settings
        ),
    )
    (group,) = make_groups(records)
    schedules = Comparison("schedules", "Schedule", ("sparsity.schedule",))
    tables = group_tables(group, [RATES, METRICS, schedules, LEARNING_RATES])
    assert [(table.title, [row[0] for row in table.rows]) for table in tables[:4]] == [
        ("Omission rate", ["dense", "r = 0.2", "r = 0.4"]),
        (
            "Metric",
            [
                "dense",
                "r = 0.4",
                "r = 0.4, metric wanda",
                "r = 0.4, metric wanda, selection sample",
            ],
        ),
        (
            "Metric: paired differences",
            ["r = 0.4, metric wanda", "r = 0.4, metric wanda, selection sample"],
        ),
        ("Other variants", ["dense", "r = 0.4, block 2"]),
    ]
    assert [table.name for table in tables[4:]] == ["cost", "losses"]
    alone = table_of(group, "other")
    assert alone.title == "Variants" and len(alone.rows) == 6


def with_rate(config: Config, rate: float) -> Config:
    return dataclasses.replace(config, optimizer=OptimizerConfig(learning_rate=rate))


def test_settings_outside_sparsity_are_compared_across_groups(tmp_path: Path) -> None:
    """At two learning rates; of the variants those that both have."""
    records = runs(
        tmp_path,
        *(
            (
                with_rate(config_of(0, **sparsity), rate),
                summary_of(after, 18.0, SPARSE if sparsity else DENSE),
            )
            for rate, sparsity, after in (
                (1e-3, {}, 10.0), (1e-3, {"rate": 0.4}, 11.0), (1e-3, {"rate": 0.2}, 10.0),
                (2e-3, {}, 20.0), (2e-3, {"rate": 0.4}, 21.0),
            )
        ),
    )  # fmt: skip
    groups = make_groups(records)
    (table,) = across_tables(groups, [RATES, LEARNING_RATES])
    assert [(row[0], row[3]) for row in table.rows] == [
        ("learning rate 0.001: dense", "-"),
        ("learning rate 0.001: r = 0.4", "+10.0 %"),
        ("learning rate 0.002: dense", "-"),
        ("learning rate 0.002: r = 0.4", "+5.0 %"),
    ]
    assert len(quality_table(groups).rows) == 5


def test_the_best_dense_baseline_is_that_of_seeds_that_all_have(tmp_path: Path) -> None:
    """Seed 0: dense 10 at 1e-3, 9 at 2e-3. Seed 1 is missing at 2e-3, and would have decided.

    All are compared with 9 for seed 0, and at equal FLOPs with the dense run of 6 steps, 12.
    """

    def case(learning_rate: float, seed: int, rate: float, after: float, steps: int = 8) -> Any:
        config = with_rate(config_of(seed, rate=rate), learning_rate)
        train = dataclasses.replace(config.train, steps=steps)
        flops = {"spent_flops": 1e10} if rate == 0 and steps == 8 else {}
        summary = summary_of(after, 18.0, SPARSE if rate else DENSE, steps=steps, **flops)
        return dataclasses.replace(config, train=train), summary

    records = runs(
        tmp_path,
        *(case(1e-3, 0, 0.0, 10.0), case(1e-3, 1, 0.0, 5.0)),
        *(case(1e-3, 0, 0.4, 10.8), case(1e-3, 1, 0.4, 6.0)),
        *(case(2e-3, 0, 0.0, 9.0), case(2e-3, 0, 0.4, 18.0), case(2e-3, 0, 0.0, 12.0, steps=6)),
    )
    (table,) = across_tables(make_groups(records), [LEARNING_RATES])
    assert table.header[-2:] == ("from best dense", "from best dense at equal FLOPs")
    assert [(row[0].removeprefix("learning rate "), *row[-2:]) for row in table.rows] == [
        ("0.001: dense", "+11.1 %§", "-"),
        ("0.001: r = 0.4", "+20.0 %§", "-10.0 %§"),
        ("0.002: dense", "-", "-"),
        ("0.002: dense, 6 steps", "+33.3 %", "-"),
        ("0.002: r = 0.4", "+100.0 %", "+50.0 %"),
    ]


def test_paired_differences_are_taken_seed_by_seed(tmp_path: Path) -> None:
    """Gaps of 10 and 20 % without, 13 and 21 % with: 3 and 1 points more. r = 0.2 has no pair."""
    records = runs(
        tmp_path,
        *((config_of(s), summary_of(10.0, 38.0, DENSE, spent_flops=1e10)) for s in (0, 1)),
        *(
            (config_of(seed, **sparsity), summary_of(after, 18.0, SPARSE))
            for seed, sparsity, after in (
                (0, {"rate": 0.4}, 11.0), (1, {"rate": 0.4}, 12.0), (0, {"rate": 0.6}, 15.0),
                (0, {"rate": 0.4, "metric": "wanda"}, 11.3),
                (1, {"rate": 0.4, "metric": "wanda"}, 12.1),
                (0, {"rate": 0.2, "metric": "wanda"}, 10.1),
            )
        ),
    )  # fmt: skip
    (group,) = make_groups(records)
    both = Comparison("metrics", "Metric", ("sparsity.metric", "sparsity.rate"))
    (table,) = (t for t in group_tables(group, [RATES, both]) if "paired" in t.name)
    assert table.name == "metrics_paired" and "percentage points" in table.caption
    assert table.header == ("variant", "seeds", "from dense")
    assert table.rows == (("r = 0.4, metric wanda", "2", "+2.0 ± 1.0"),)


def test_held_out_losses_during_the_run(tmp_path: Path) -> None:
    records = study(tmp_path)
    names = [table.name for table in group_tables(make_groups(records)[0], [])]
    assert "held_out" not in names
    for row in records:
        losses = [3.0, 2.5, 2.0 + row["rate"]]
        row["curve"] = {"eval_tokens": [0, 1000, 4000], "eval_loss": losses}
    table = table_of(make_groups(records)[0], "held_out")
    assert table.header == ("variant", "seeds", "0 %", "25 %", "100 %")
    assert table.rows[1] == ("r = 0.2", "1", "3.000", "2.500", "2.200")


def test_training_losses_are_compared_by_parts_of_the_run(tmp_path: Path) -> None:
    """Half a nat above dense in the first of eight steps, a quarter in the second; of the second
    seed nothing."""
    records = study(tmp_path)
    curve = {"tokens": [500 * k for k in range(1, 9)], "loss": [float(8 - k) for k in range(8)]}
    for row in records:
        row["curve"] = curve
    higher = [
        loss + extra for loss, extra in zip(curve["loss"], [0.5, 0.25, *[0.0] * 6], strict=True)
    ]
    sparse = next(row for row in records if row["rate"] == 0.4)
    sparse["curve"] = {**curve, "loss": higher}
    (group,) = make_groups(records)
    table = table_of(group, "losses")
    assert table.header[:4] == ("variant", "seeds", "steps 1 to 1", "2 to 2")
    assert table.rows[1] == (
        "r = 0.4", "2", "+0.25 ± 0.25", "+0.12 ± 0.12", *["+0.00 ± 0.00"] * 6,
    )  # fmt: skip
    (dense,) = make_groups([row for row in records if row["rate"] == 0])
    assert quality_figure(dense) is None
    assert [table.name for table in group_tables(dense, [])] == ["other", "cost"]
    assert [row[0] for row in quality_table([dense]).rows] == ["dense"]


def test_captions_have_what_runs_share(tmp_path: Path) -> None:
    tuned = dataclasses.replace(
        config_of(0, rate=0.4, dense_layers=(0,)), data=DataConfig(format="messages")
    )
    records = runs(tmp_path, (tuned, summary_of(10.0, 38.0, SPARSE, loss_tokens=1000)))
    (group,) = make_groups(records)
    caption = quality_table([group]).caption
    assert "8 steps, 4,000 tokens; 25 % of them with loss; learning rate 0.0001, " in caption
    assert "unless named otherwise dense layers 0; data dddddddd; NVIDIA H200" in caption
    assert (
        sentence(group.sparse[0])
        == "r = 0.4: perplexity 10.000 (1 seed), without a dense baseline."
    )


def test_the_figure_names_every_variant_and_joins_dense_runs(tmp_path: Path) -> None:
    """The line is from 80 % of the FLOPs, 20 % from dense, to the dense run."""
    group, _ = make_groups(shorter(tmp_path))
    figure = quality_figure(group)
    assert figure is not None
    (axes,) = figure.axes
    assert_close(axes.lines[0].get_xydata(), [[80.0, 20.0], [100.0, 0.0]], "float64", "forward")
    places = {text.get_text(): text.xy for text in axes.texts}
    assert places.keys() == {"dense", "dense, 6 steps", "r = 0.4"}
    assert_close(places["r = 0.4"], (80.0, 12.0), "float64", "forward")
    assert axes.get_yscale() == "linear"
    far = (config_of(0, rate=0.6), summary_of(16.0, 18.0, SPARSE))
    group, _ = make_groups([*shorter(tmp_path), *runs(tmp_path, far)])
    figure = quality_figure(group)
    assert figure is not None and figure.axes[0].get_yscale() == "symlog"


class Page(HTMLParser):
    """Checks that elements nest, and collects links, ids and the text of cells."""

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


def test_a_page_without_results_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no finished run and no evaluation to report on"):
        write_report([], [RATES], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_page_is_one_file_with_every_number(tmp_path: Path) -> None:
    records = study(tmp_path)
    other = (with_rate(config_of(0, rate=0.4), 0.5), summary_of(12.0, 18.0, SPARSE))
    records = [*records, *runs(tmp_path, other)[-1:]]
    html, markdown = write_report([*records, records[0]], [RATES, RATES], tmp_path / "out")
    text = html.read_text()
    assert "http" not in text and "url(" not in text and "@import" not in text
    page = Page(text)
    (image,) = [link for link in page.links if link.startswith("data:image/svg+xml;base64,")]
    assert {link[1:] for link in page.links if link != image} == set(page.ids)
    assert text.index(image) < text.index("r = 0.4: perplexity +15.0 %") < text.index("<table")
    large, small = make_groups(records)
    tables = [*group_tables(large, [RATES]), quality_table([small], "Other settings")]
    assert page.cells == [cell for one in tables for row in (one.header, *one.rows) for cell in row]
    assert "NVIDIA H200" in text and "aaaaaaaaaa (6 of 7)" in text
    for table in tables:
        assert f"### {table.title}\n\n{table.markdown()}\n" in markdown.read_text()
