"""Tables in documents, made of committed rows."""

import json
from pathlib import Path

import pytest

from sat_jax.errors import UserError
from sat_jax.results.documents import draw, fill, is_outdated, outdated
from sat_jax.results.rows import read
from sat_jax.results.sweep import declared_comparisons
from scripts.tables import RESULTS, STUDY
from tests.conftest import ROOT
from tests.result_runs import RATES, study


def test_a_table_in_a_document_is_made_of_rows(tmp_path: Path) -> None:
    study(tmp_path)
    mark = "<!-- table: rows.quality commit=a -->\n"
    text = f"Before\n{mark}old\n<!-- /table -->\nafter"
    filled = fill(text, tmp_path, "x.md", [RATES])
    assert filled.startswith(f"Before\n{mark}\n| variant") and filled.endswith(
        "<!-- /table -->\nafter"
    )
    assert "| r = 0.4 |     2 |" in filled and "| r = 0.2 " not in filled
    assert fill(filled, tmp_path, "x.md", [RATES]) == filled
    inline = "`<!-- table: runs.rates -->` in the middle of a line is no mark\n"
    assert fill(inline + filled, tmp_path, "x.md", [RATES]) == inline + filled
    exact = text.replace("commit=a", "steps=80,8 tokens=4e3 commit=c,a,b")
    assert "| r = 0.2 " in fill(exact, tmp_path, "x.md", [RATES])
    rows = [
        {**row, "settings": {"optimizer.momentum": 0.1}} for row in read(tmp_path / "rows.jsonl")
    ]
    (tmp_path / "set.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    of_setting = text.replace("rows.quality commit=a", "set.rates optimizer.momentum=1e-1")
    assert "| r = 0.2 " in fill(of_setting, tmp_path, "x.md", [RATES])
    for wrong, why in (
        (text.replace("quality", "moments"), "no rows for moments; there are rows for: quality"),
        (text.replace("rows.", "none."), "no such results file"),
        (text.replace("<!-- /table -->", ""), "not one of a pair"),
        (text.replace("<!-- /table -->", "") + text, "not one of a pair"),
        (text.replace("table: rows", "table:rows"), "is malformed"),
        (text.replace("commit=a", "commit a"), "is malformed"),
        (text.replace("commit=a -->", "commit=a --> "), "is malformed"),
        (text.replace("<!-- table", "  <!-- Table"), "is malformed"),
        (text.replace("<!-- /table", "<!--/table"), "is malformed"),
        (text.replace(mark, ""), "not one of a pair"),
        (text.replace("commit=a", "steps=8,a"), "steps=8,a is no number"),
        (of_setting.replace("1e-1", "0.2"), "there are rows for: none"),
        (of_setting.replace("1e-1", "0.2a"), "optimizer.momentum=0.2a is no number"),
        (text.replace("commit=a", "steps=80"), "there are rows for: none"),
        (text.replace("commit=a", "tokens=4"), "there are rows for: none"),
        (
            text.replace("commit=a", "optimizer.lerning_rate=1"),
            "is not a setting; near: optimizer.lea",
        ),
    ):
        with pytest.raises(UserError, match=f"x.md: .*{why}"):
            fill(wrong, tmp_path, "x.md", [RATES])


def test_the_documents_are_what_the_rows_make_of_them() -> None:
    comparisons = declared_comparisons(ROOT / "experiments")
    assert list(outdated(ROOT, RESULTS, comparisons)) == [], "run: make tables"
    assert not is_outdated(*STUDY), "run: make tables"
    assert "<!-- table: " in (ROOT / "README.md").read_text()
    for file in RESULTS.glob("*.jsonl"):
        assert all("date" in row for row in read(file))


def test_a_picture_is_outdated_when_its_rows_change(tmp_path: Path) -> None:
    study(tmp_path)
    rows, picture = tmp_path / "rows.jsonl", tmp_path / "made" / "study.png"
    assert is_outdated(rows, picture)
    draw(rows, picture)
    assert not is_outdated(rows, picture)
    rows.write_text("\n".join(reversed(rows.read_text().splitlines())) + "\n")
    assert is_outdated(rows, picture)
    rows.write_text("")
    with pytest.raises(UserError, match="no sparse run with a dense baseline"):
        draw(rows, picture)
