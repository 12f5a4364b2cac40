"""Tables in documents, made of committed rows."""

import json
from pathlib import Path

import pytest

from sat_jax.analysis.rows import read
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


def test_the_documents_are_what_the_rows_make_of_them() -> None:
    assert list(outdated(ROOT)) == [], "run: make tables"
    assert outdated_pictures(ROOT / RESULTS, ROOT / PICTURES) == [], "run: make tables"
    assert "<!-- table: " in (ROOT / "README.md").read_text()
    for file in (ROOT / RESULTS).glob("*.jsonl"):
        assert all("date" in row for row in read(file))
