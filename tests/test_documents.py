"""Tables in documents, made of committed rows."""

import json
from pathlib import Path
from typing import Any

import pytest

from sat_jax.analysis.rows import read
from sat_jax.config_values import name_of
from sat_jax.errors import UserError
from sat_jax.report.documents import RESULTS, filled, outdated
from sat_jax.report.pictures import outdated_pictures
from scripts.tables import PICTURES
from tests.conftest import ROOT
from tests.report_runs import study


def test_a_table_in_a_document_is_made_of_rows(tmp_path: Path) -> None:
    study(tmp_path)
    mark = "<!-- table: rows.rates commit=a -->\n"
    text = f"Before\n{mark}old\n<!-- /table -->\nafter"
    made = filled(text, tmp_path, "x.md")
    assert made.startswith(f"Before\n{mark}\n| rate") and made.endswith("<!-- /table -->\nafter")
    assert "| 0.4   |     2 |" in made and "| 0.2 " not in made
    assert filled(made, tmp_path, "x.md") == made
    told = "`<!-- table: runs.rates -->` in the middle of a line is no mark\n"
    assert filled(told + made, tmp_path, "x.md") == told + made
    exact = text.replace("commit=a", "steps=80,8 tokens=4e3 commit=c,a,b")
    assert "| 0.2 " in filled(exact, tmp_path, "x.md")
    rows = [
        {**row, "settings": {"optimizer.momentum": 0.1}} for row in read(tmp_path / "rows.jsonl")
    ]
    (tmp_path / "set.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    of_setting = text.replace("rows.rates commit=a", "set.rates optimizer.momentum=1e-1")
    assert "| 0.2 " in filled(of_setting, tmp_path, "x.md")
    for wrong, why in (
        (
            text.replace("rates", "moments"),
            "no rows for moments; there are rows for: rates, losses",
        ),
        (text.replace("rows.", "none."), "no such results file"),
        (text.replace("<!-- /table -->", ""), "is not closed"),
        (text.replace("table: rows", "table:rows"), "is no mark of a table; accepted"),
        (text.replace("commit=a", "commit a"), "is no mark of a table"),
        (text.replace("commit=a -->", "commit=a --> "), "is no mark of a table"),
        (text.replace("<!-- table", "  <!-- Table"), "is no mark of a table"),
        (text.replace("<!-- /table", "<!--/table"), "is no mark of a table"),
        (text.replace(mark, ""), "without a table that begins"),
        (text.replace("commit=a", "steps=8,a"), "steps=8,a is no number"),
        (of_setting.replace("1e-1", "0.2"), "there are rows for: none"),
        (of_setting.replace("1e-1", "0.2a"), "optimizer.momentum=0.2a is no number"),
        (text.replace("commit=a", "steps=80"), "there are rows for: none"),
        (text.replace("commit=a", "tokens=4"), "there are rows for: none"),
    ):
        with pytest.raises(UserError, match=f"x.md: .*{why}"):
            filled(wrong, tmp_path, "x.md")


def test_evaluations_stand_beside_each_other_where_the_same_was_asked(tmp_path: Path) -> None:
    device = {"platform": "cpu", "kind": "a CPU", "count": 1, "host_cpus": 2}
    asked = {"measure": "answers", "data": "q.jsonl", "device": device, "questions": 50}
    figures = {"accuracy": 0.1, "stderr": 0.0424, "no_result": 0.5, "cut": 0.25}
    base = asked | figures | {"model": "m", "run": None, "options": {"chat": True, "limit": None}}

    def run(**settings: Any) -> dict[str, Any]:
        settings = {f"sparsity.{key}": value for key, value in settings.items()}
        settings |= {"data.sources": ["a.jsonl"], "optimizer.learning_rate": 0.1}
        return base | {"run": {"seed": 1, "twin": "abcdef012", "settings": settings}}

    trained = run(rate_mlp=0.4, dense_layers=[0, 1])
    rows = [base, trained, trained | {"accuracy": 0.2}, base | {"options": {"chat": False}}]
    rows += [run(rate=0.4, rate_attention=0, rate_mlp=0), run(rate=0.4, metric="wanda")]
    rows += [run(layer_rates_mlp=[0.2, 0.6], layer_rates_attention=[0.2, 0.6]), run(metric="svd")]
    choices = base | {"measure": "choices", "accuracy_per_byte": 0.3, "stderr_per_byte": 0.01}
    rows.append(choices | {"chance": 0.25})
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    text = "<!-- table: rows.answers -->\n<!-- /table -->\n"
    first, note, second, _ = filled(text, tmp_path, "x.md").split("\n\n")[1:5]
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in first.splitlines()]
    assert cells[2:] == [
        ["m", "10.0 % ± 4.2 %", "50 %", "25 %"],
        [
            "a.jsonl: rate 0 of heads, 0.4 of channels, dense layers 0,1, seed 1",
            *("20.0 % ± 4.2 %", "50 %", "25 %"),
        ],
        [f"a.jsonl: dense, seed 1 ({name_of(rows[4]['run'])[:6]})", *cells[2][1:]],
        ["a.jsonl: rate 0.4, metric wanda, seed 1", *cells[2][1:]],
        ["a.jsonl: rate 0.2 to 0.6, seed 1", *cells[2][1:]],
        [f"a.jsonl: dense, seed 1 ({name_of(rows[7]['run'])[:6]})", *cells[2][1:]],
    ]
    assert note.startswith("q.jsonl, 50 questions; chat True; a CPU, 2 cores.")
    assert len(second.splitlines()) == 3
    picked = filled(text.replace("answers", "choices"), tmp_path, "x.md")
    assert "| 10.0 % ± 4.2 % | 30.0 % ± 1.0 % |      25 % |" in picked
    alone = base | {"questions": 1, "stderr": None}
    (tmp_path / "rows.jsonl").write_text(json.dumps(alone) + "\n")
    assert "| m     |      10.0 % |" in filled(text, tmp_path, "x.md")
    (tmp_path / "rows.jsonl").write_text("")
    with pytest.raises(UserError, match="no evaluation by answers among the rows"):
        filled(text, tmp_path, "x.md")


def test_the_documents_are_what_the_rows_make_of_them() -> None:
    assert list(outdated(ROOT)) == [], "run: make tables"
    assert outdated_pictures(ROOT / RESULTS, ROOT / PICTURES) == [], "run: make tables"
    assert "<!-- table: " in (ROOT / "README.md").read_text()
    for file in (ROOT / RESULTS).glob("*.jsonl"):
        assert all("date" in row for row in read(file))
