"""Tables and a figure of extended contexts, by hand."""

from pathlib import Path
from typing import Any

import pytest

from sat_jax.config_values import from_config_dict
from sat_jax.results.documents import draw, fill, is_outdated
from sat_jax.results.evaluations import evaluation_tables
from sat_jax.results.extension import extension_figure, extension_tables
from sat_jax.results.page import write_report
from sat_jax.results.record import record_run, row_of
from sat_jax.results.rows import Row, append, read
from tests.result_runs import DENSE, DEVICE, RECORDS, summary_of

ORIGIN = {"device": DEVICE, "versions": {"python": "3.11.7"}, "commit": "a" * 40}
BASE: dict[str, Any] = {"data.sources": ["docs"], "data.row_length": 256}
TRAINED = {
    **BASE,
    "model.rope_type": "yarn",
    "model.rope_factor": 4.0,
    "data.row_length": 1024,
    "train.steps": 3,
    "train.rows_per_step": 2,
    "optimizer.learning_rate": 5e-4,
}
SAT = TRAINED | {"sparsity.rate": 0.4}
POSE = TRAINED | {"data.row_length": 256, "data.pose_length": 1024, "train.rows_per_step": 8}


def evaluated(
    settings: dict[str, Any],
    context: int,
    value: float,
    *,
    seed: int = 0,
    scaling: str | None = None,
    factor: float = 4.0,
    measure: str = "context",
) -> Row:
    """A row of `scripts.evaluate`; `value` is the perplexity or the accuracy."""
    options = {"rope_type": scaling, "rope_factor": factor if scaling else None}
    row = {
        "measure": measure, "model": "x", "options": options, "context": context,
        "run": {"seed": seed, "twin": "t", "settings": settings},
    }  # fmt: skip
    if measure == "context":
        figures = {"data": ["a.txt"], "stride": 256, "documents": 2, "tokens": 9000}
        figures |= {"perplexity": value, "window_perplexity": value, "position_perplexity": [value]}
    else:
        figures = {"data": "passkey retrieval", "prompts": 10, "accuracy": value, "stderr": 0.1}
    return row | figures


ROWS = [
    evaluated(BASE, 256, 20.0, scaling="default"),
    evaluated(BASE, 1024, 90.0, scaling="default"),
    evaluated(BASE, 256, 25.0, seed=1, scaling="default"),
    evaluated(BASE, 1024, 110.0, seed=1, scaling="default"),
    evaluated(BASE, 256, 21.0, scaling="yarn"),
    evaluated(BASE, 1024, 30.0, scaling="yarn"),
    evaluated(TRAINED, 256, 20.0),
    evaluated(TRAINED, 1024, 99.0),  # measured again below
    evaluated(TRAINED, 1024, 18.0),
    evaluated(TRAINED, 1024, 20.0, seed=1),
    evaluated(POSE, 1024, 19.0),
    evaluated(SAT, 1024, 22.0),
    evaluated(TRAINED, 1024, 0.75, measure="passkey"),
    evaluated(TRAINED, 1024, 0.25, seed=1, measure="passkey"),
]


def recorded(file: Path) -> list[Row]:
    append(file, ROWS, ORIGIN)
    return read(file)


def test_each_scaling_beside_the_base(tmp_path: Path) -> None:
    (table,) = extension_tables(recorded(tmp_path / "rows.jsonl"))
    assert table.name == "extension" and table.title == "Context × 4"
    assert table.header == (
        *("scaling", "training", "seeds", "256 tokens", "1,024 tokens", "from the base"),
        *("passkey, 1,024", "tokens to the base's loss"),
    )
    none, trained = "none", "6,144 tokens at 0.0005"
    # 90 is 350 % above 20 and 110 is 340 % above 25; 18 is 10 % and 20 is 20 % below.
    assert table.rows == (
        ("default", none, "2", "22.50 ± 2.50", "100.00 ± 10.00", "+345.0 % ± 5.0 %", "-", "-"),
        ("yarn", none, "1", "21.00", "30.00", "+50.0 %", "-", "-"),
        ("yarn", trained, "2", "20.00§", "19.00 ± 1.00", "-15.0 % ± 5.0 %", "50 % ± 25 %", "-"),
        ("yarn", f"{trained}, SAT from 0.4", "1", "-", "22.00", "+10.0 %", "-", "-"),
        ("yarn", f"{trained}, PoSE", "1", "-", "19.00", "-5.0 %", "-", "-"),
    )
    assert "of a.txt (9,000 tokens)" in table.caption and "rows of 256 tokens" in table.caption


def test_a_scaling_that_grows_by_itself_is_in_every_table(tmp_path: Path) -> None:
    growing = [evaluated(BASE, n, n / 10, scaling="dynamic_yarn", factor=1.0) for n in (1024, 2048)]
    longer = evaluated(BASE, 2048, 80.0, scaling="yarn", factor=8.0)
    append(tmp_path / "rows.jsonl", [*ROWS, *growing, longer], ORIGIN)
    tables = extension_tables(read(tmp_path / "rows.jsonl"))
    assert [table.title for table in tables] == ["Context × 4", "Context × 8"]
    shorter, longest = (
        {row[0]: row[3:] for row in table.rows if row[1] == "none"} for table in tables
    )
    # 102.40 is 412 % above 20, and 204.80 is 924 % above it.
    assert shorter["dynamic_yarn"] == ("-", "102.40", "+412.0 %", "-", "-")
    assert longest["dynamic_yarn"] == ("204.80", "+924.0 %", "-")
    assert longest.keys() == {"dynamic_yarn", "yarn"}


def run_row(perplexity: float, losses: dict[int, float], **settings: Any) -> Row:
    """The row of a run that was evaluated after so many tokens."""
    config = from_config_dict({"data": {"row_length": 256}} | settings)
    records = [{"eval_loss": loss, "tokens": tokens} for tokens, loss in losses.items()]
    summary = summary_of(perplexity, 18.0, DENSE)
    return row_of("experiments/x.py", config, summary, [*RECORDS[1:3], *records])


EXTENDED: dict[str, Any] = {
    "model": {"rope_type": "yarn", "rope_factor": 4.0},
    "data": {"row_length": 1024},
    "train": {"steps": 3, "rows_per_step": 2},
    "optimizer": {"learning_rate": 5e-4},
}


@pytest.mark.parametrize(
    ("last", "text"),
    [(2.9, "4,096"), (2.99, "4,096"), (3.0, "not reached")],  # of the base model: ln 20 = 2.996
)
def test_tokens_until_the_loss_is_that_of_the_base(tmp_path: Path, last: float, text: str) -> None:
    file = tmp_path / "rows.jsonl"
    recorded(file)
    record_run(file, run_row(20.0, {}))
    losses = {0: 4.0, 2048: 3.1, 4096: last, 6144: last}
    record_run(file, run_row(18.0, losses, **EXTENDED))
    (table,) = extension_tables(read(file))
    assert [row[-1] for row in table.rows] == ["-", "-", text, "-", "-"]


def test_a_curve_has_the_evaluations_between_start_and_end() -> None:
    assert run_row(20.0, {0: 4.0, 9: 3.0})["curve"].keys() == {"tokens", "loss"}
    curve = run_row(20.0, {0: 4.0, 9: 3.123456, 18: float("nan")})["curve"]
    assert (curve["eval_tokens"], curve["eval_loss"]) == ([0, 9, 18], [4.0, 3.1235, None])


def test_documents_and_reports_have_the_table_and_the_figure(tmp_path: Path) -> None:
    file, picture = tmp_path / "context.jsonl", tmp_path / "pictures" / "context.png"
    assert not is_outdated(file, picture)  # nothing is measured
    rows = recorded(file)
    assert is_outdated(file, picture)
    draw(file, picture)
    assert not is_outdated(file, picture)
    text = fill("<!-- table: context.extension -->\n<!-- /table -->\n", tmp_path, "x.md", [])
    assert "6,144 tokens at 0.0005, PoSE |" in text
    figure = extension_figure(rows)
    assert figure is not None
    untrained, trained = figure.axes
    assert [line.get_label() for line in untrained.lines] == ["default", "yarn"]
    assert [line.get_label() for line in trained.lines] == ["yarn", "yarn, PoSE", "yarn, SAT"]
    assert untrained.lines[0].get_ydata().tolist() == [22.5, 100.0]
    write_report(rows, [], tmp_path)
    assert "## Extended contexts" in (tmp_path / "tables.md").read_text()


def test_other_evaluations_are_not_in_the_table() -> None:
    rows = [{**row, **ORIGIN, "date": "2026"} for row in (evaluated(BASE, 256, 20.0),)]
    assert extension_tables(rows) == [] and extension_figure(rows) is None
    assert evaluation_tables(rows)
