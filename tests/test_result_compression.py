"""The table and the figure of compressed models, by hand."""

from pathlib import Path
from typing import Any

from sat_jax.results.compression import compression_figure, compression_tables, pareto_front
from sat_jax.results.page import write_report
from sat_jax.results.rows import Row
from tests.result_runs import DEVICE


def compressed(after: float, smallest: float, *, model: str = "m", **method: Any) -> Row:
    """A row of `scripts.compress --record`, of a model with 1,000 bytes and perplexity 10."""
    return {
        "measure": "compression",
        "model": model,
        "method": {"block": 128, "pattern": None, **method},
        "calibration": {"sources": ["a"], "fingerprint": "f", "rows": 8, "adds_bos": False},
        "perplexity": {"before": 10.0, "after": after, "held_out_tokens": 999, "context": 256},
        "bytes": {"before": 1000, "after": 1000, "without_zeros": 1000 * smallest},
        "flops_per_token": {"before": 10.0, "after": 10.0, "without_zeros": 10 * smallest},
        "device": DEVICE,
        "date": "2026",
        "commit": "a" * 40,
        "versions": {"python": "3.11.7"},
    }


ROWS = [
    compressed(10.5, 0.75, method="wanda", sparsity=0.25),
    compressed(99.0, 0.5, method="wanda", sparsity=0.5),  # measured again below
    compressed(12.0, 0.5, method="wanda", sparsity=0.5),
    compressed(11.0, 0.5, method="sparsegpt", sparsity=0.5),
    compressed(20.0, 0.5, model="other", method="wanda", sparsity=0.5),
]


def test_each_method_beside_the_model_before() -> None:
    table, other = compression_tables(ROWS)
    assert table.rows == (
        ("wanda, sparsity 0.25", "10.500", "+5.0 %", "100 %", "75 %", "75 %"),
        ("wanda, sparsity 0.5", "12.000", "+20.0 %", "100 %", "50 %", "50 %"),
        ("sparsegpt, sparsity 0.5", "11.000", "+10.0 %", "100 %", "50 %", "50 %"),
    )
    assert table.caption.startswith("m, perplexity 10.000 before, on 999 held-out tokens of a")
    assert [row[0] for row in other.rows] == ["wanda"]  # nothing differs


def test_the_front_has_what_no_other_beats() -> None:
    assert pareto_front([(75, 5), (50, 20), (50, 10), (80, 5)]) == [(50, 10), (75, 5)]
    figure = compression_figure(ROWS)
    assert figure is not None
    size, flops = figure.axes
    for axes in (size, flops):
        *_, front = axes.lines
        assert front.get_xydata().round(6).tolist() == [[50.0, 10.0], [75.0, 5.0]]
    assert compression_figure([{"measure": "context"}]) is None


def test_the_report_has_both(tmp_path: Path) -> None:
    write_report(ROWS, [], tmp_path)
    assert "## Compression" in (tmp_path / "tables.md").read_text()
    assert "by method of compression" in (tmp_path / "report.html").read_text()
