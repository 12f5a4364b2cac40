"""Tables in documents, made of committed rows."""

import json
from pathlib import Path

import pytest

from sat_jax.errors import UserError
from sat_jax.results.claims import unsupported
from sat_jax.results.documents import draw, fill, is_outdated, outdated
from sat_jax.results.rows import read
from sat_jax.results.sweep import declared_comparisons
from scripts.tables import CLAIMS, PICTURES, RESULTS
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
    assert "|     1 |" in fill(text.replace("commit=a", "seed=0"), tmp_path, "x.md", [RATES])
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
        (text.replace("commit=a", "sead=0"), "sead is not a setting; near: seed"),
        (text.replace("commit=a", "tokens=4"), "there are rows for: none"),
        (
            text.replace("commit=a", "optimizer.lerning_rate=1"),
            "is not a setting; near: optimizer.lea",
        ),
    ):
        with pytest.raises(UserError, match=f"x.md: .*{why}"):
            fill(wrong, tmp_path, "x.md", [RATES])


CLAIM_TABLE = """<!-- table: x.quality -->

| variant | perplexity | from dense | FLOPs |
| r = 0.4 | 5.318 ± 0.078 | -4.2 % ± 0.6 % | 83 % |
| r = 0.6 | 5.553 | +8.8 % | 72 % |

1,024 tokens; bound 1.20×

<!-- /table -->
"""


@pytest.mark.parametrize(
    ("prose", "missing"),
    [
        ("4.2 % ± 0.6 %, 4.2 or 8.8 %, 4.2 →\n8.8 %, an error of 0.6 %; 5.318; 1.20×", []),
        ("17 % fewer, 83 % of all; `9.9 %`, [9.9](9.9), 1.5e-4, v9.9, 0.4.1, 99 tokens", ["9.9"]),
        ("```\n9.9 %\n```\n<!-- 9.9 % -->", []),
        ("4.3 %", ["4.3 %"]),
        ("a gap of 4.3 and 8.8 %", ["4.3 %"]),
        ("4.2 % ± 0.7 %", ["4.2 % ± 0.7 %"]),
        ("4.2 ± 0.6", ["4.2 ± 0.6"]),
        ("1.20 %, 8.8×, 18 %, 1.2×", ["1.20 %", "8.8×", "18 %", "1.2×"]),
        ("| a | 4.1 % |\n| b | 4.2 % |", ["4.1 %"]),
        ("at most 5 %\n<!-- not from rows: 5 % -->\n\nat least 5 %", ["5 %"]),
        ("4.2 % <!-- not from rows: 4.2 % -->", ["the exception for 4.2 %"]),
    ],
)
def test_numbers_of_sentences_must_be_in_a_table(prose: str, missing: list[str]) -> None:
    findings = unsupported(f"{CLAIM_TABLE}\n{prose}\n")
    assert [why.partition(" is ")[0] for _, why in findings] == missing


def test_a_wrong_number_is_named_with_its_line_and_what_is_accepted() -> None:
    ((line, why),) = unsupported(f"First\nline, then 4.3 %\n\n{CLAIM_TABLE}")
    assert line == 2 and "a number of a table, or <!-- not from rows: 4.3 % -->" in why
    assert unsupported("4.2 %") and not unsupported("4.2 %", CLAIM_TABLE)


@pytest.mark.slow
def test_the_documents_are_what_the_rows_make_of_them() -> None:
    comparisons = declared_comparisons(ROOT / "experiments")
    assert list(outdated(ROOT, RESULTS, comparisons)) == [], "run: make tables"
    assert not any(is_outdated(*pair) for pair in PICTURES), "run: make tables"
    for document, quoted in CLAIMS.items():
        assert unsupported(*(path.read_text() for path in (document, *quoted))) == [], document
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
    with pytest.raises(UserError, match=r"rows.jsonl: no rows for study\.png"):
        draw(rows, picture)
