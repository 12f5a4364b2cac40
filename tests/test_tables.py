"""Text tables, the end of a run, and committed rows."""

import json
from pathlib import Path
from typing import Any

import pytest

from sat_jax.errors import UserError
from sat_jax.results.rows import append, latest, read
from sat_jax.results.run_table import end_of_run
from sat_jax.results.text import fixed_width, markdown, percent, quantity


def rung(rate: float, speed: float | None, **changed: Any) -> dict[str, Any]:
    return {
        "omission_rate": rate,
        "kept_heads": 1.0,
        "kept_channels": 1 - rate,
        "steps": 8,
        "tokens": 8192,
        "steps_timed": 5,
        "tokens_per_second": speed,
        "bound": 1 / (1 - rate / 2),
    } | changed


SPARSE = rung(0.5, 150.0, tokens=3000, speedup=1.3, speedup_spread=0.05, cpu_speedup=1.25)
DENSE = rung(0.0, 100.0, tokens=1000, speedup=1.0, speedup_spread=0.0, cpu_speedup=1.0)


def summary(**changed: Any) -> dict[str, Any]:
    return {
        "perplexity_before": 13.5,
        "perplexity_after": 6.6,
        "perplexity_dense": 6.0,
        "rungs": [SPARSE, DENSE],
        "spent_flops": 3e13,
        "dense_flops": 4e13,
        "seconds": {"compile": 30.0, "step": 90.0, "data": 0.0, "total": 120.0},
        "figures": ["runs/a/loss.png", "runs/a/kept.png"],
        "export": "runs/a/huggingface",
        "adapter": "runs/a/adapter",
        "next_commands": ["python -m scripts.generate", "python -m scripts.train"],
    } | changed


def test_fixed_width() -> None:
    text = fixed_width(("name", "n"), [("a", "1"), ("longer", "100")])
    assert text.split("\n") == [
        "name      n",
        "------  ---",
        "a         1",
        "longer  100",
    ]


def test_markdown_escapes_bars() -> None:
    text = markdown(("a|b", "n"), [("x", "1")])
    assert text.split("\n") == ["| a\\|b |   n |", "| ---- | --: |", "| x    |   1 |"]


@pytest.mark.parametrize("render", [fixed_width, markdown])
def test_a_row_of_another_length_is_refused(render: Any) -> None:
    with pytest.raises(ValueError, match="zip"):
        render(("a", "b"), [("x",)])


def test_numbers_for_people() -> None:
    assert [quantity(v, "FLOP") for v in (12, 1500, 2.5e14, 999.96e9)] == [
        "12 FLOP", "1.50 kFLOP", "250.0 TFLOP", "1.00 TFLOP",
    ]  # fmt: skip
    assert percent(0.405) == "40 %"


def test_the_end_of_a_run_tells_nan_from_infinity() -> None:
    changed = {"perplexity_before": None, "perplexity_after": None}
    lines = end_of_run(summary() | changed | {"nonfinite": {"perplexity_after": "nan"}}).split("\n")
    assert [line.split() for line in lines[1:3]] == [["before", "infinite"], ["after", "NaN"]]


def test_end_of_run() -> None:
    assert end_of_run(summary()).split("\n") == [
        "Held-out perplexity",
        "  before      13.500",
        "  after        6.600",
        "  dense run    6.000  on the same tokens; this run differs by +10.0 %",
        "",
        "Speed of each rung: kept shares, median tokens/s, speed-up over the dense rung by wall"
        " time and by CPU time, FLOP bound",
        "  rate   heads  channels  steps  tokens/s       speed-up  CPU time  bound",
        "  -----  -----  --------  -----  --------  -------------  --------  -----",
        "  0.50   100 %      50 %      8       150  1.30× ± 0.05×     1.25×  1.33×",
        "  dense  100 %     100 %      8       100          1.00×     1.00×  1.00×",
        "  All steps of the run: 1.21× ± 0.03×, bound 1.23×.",
        "",
        "Cost",
        "  FLOPs  30.00 TFLOP  75 % of 40.00 TFLOP for the same tokens, dense",
        "  time   0:02:00  step 75 %, compile 25 %",
        "",
        "Written",
        "  runs/a/loss.png",
        "  runs/a/kept.png",
        "  runs/a/huggingface",
        "  runs/a/adapter",
        "",
        "Next",
        "  python -m scripts.generate",
        "  python -m scripts.train",
    ]


def test_end_of_a_run_that_knows_less() -> None:
    short = summary(
        export=None, figures=[], rungs=[rung(0.5, 150.0), rung(0.0, 100.0, steps_timed=2)]
    )
    del short["perplexity_dense"], short["next_commands"], short["adapter"]
    text = end_of_run(short)
    assert "  0.50   100 %      50 %      8       150         -         -  1.33×" in text
    assert "  dense  100 %     100 %      8         -         -         -  1.00×" in text
    for absent in ("All steps", "same tokens;", "Written", "Next", "No rung is dense"):
        assert absent not in text


def test_a_run_without_a_dense_rung_says_so() -> None:
    text = end_of_run(summary(rungs=[rung(0.5, 150.0)]))
    assert "No rung is dense" in text and "All steps" not in text


def test_a_rung_is_dense_by_what_it_keeps() -> None:
    """A rate too small for coarse units keeps everything."""
    text = end_of_run(summary(rungs=[rung(0.02, 100.0, kept_channels=1.0)]))
    assert "\n  dense  100 %     100 %      8       100" in text


def test_rows_say_where_they_come_from(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="in a folder that exists"):
        append(tmp_path / "new" / "rows.jsonl", [{"rate": 0.4}])
    file = tmp_path / "rows.jsonl"
    append(file, [{"rate": 0.4, "speed": 0.1 + 0.2}])
    append(file, [{"rate": 0.4, "speed": 2.0}, {"rate": 0.0, "speed": 1.0}])
    rows = read(file)
    assert [(row["rate"], row["speed"]) for row in rows] == [(0.4, 0.1 + 0.2), (0.4, 2), (0, 1)]
    for row in rows:
        assert {"date", "commit", "device", "versions"} < row.keys()
        assert row["versions"]["jax"] and row["device"]["kind"]
    found = latest(rows, rate=0.4)
    assert found is not None and found["speed"] == 2.0
    assert latest(rows, rate=0.4, speed=1.0) is None
    assert latest(rows, seed=None) is None


def test_rows_that_would_lie_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    with pytest.raises(ValueError, match="must not set commit"):
        append(file, [{"commit": "0" * 40}])
    with pytest.raises(ValueError, match="not JSON compliant"):
        append(file, [{"speed": 1.0}, {"speed": float("nan")}])
    assert not file.exists()


@pytest.mark.parametrize("line", ['{"rate": 0.', "[1]", ""])
def test_a_broken_row_is_named(tmp_path: Path, line: str) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"rate": 0.4}) + "\n" + line + "\n")
    before = file.read_bytes()
    for use in (read, lambda path: append(path, [{"rate": 0.0}])):
        with pytest.raises(UserError, match=r"rows\.jsonl:2: not a JSON object") as caught:
            use(file)
        assert "\n" not in str(caught.value)
    assert file.read_bytes() == before
    with pytest.raises(UserError, match="no such results file"):
        read(tmp_path / "absent.jsonl")
