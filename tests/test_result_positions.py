"""The table of perplexity by position in the row, by hand."""

from typing import Any

from sat_jax.results.positions import position_tables
from sat_jax.results.rows import Row
from tests.result_runs import DEVICE

RETNET: dict[str, Any] = {"model.preset": "retnet-1.3b", "data.row_length": 512}


def evaluated(settings: dict[str, Any], seed: int, first: float, **fields: Any) -> Row:
    """A row of `scripts.evaluate --context`: perplexity falls by 1 with each part of a window."""
    parts = [first - part for part in range(16)]
    run = {"seed": seed, "twin": "t", "settings": settings}
    row = {"measure": "context", "data": ["novel.txt"], "options": {}, "context": 512, "run": run}
    numbers = {"stride": 256, "tokens": 9000, "perplexity": first - 8, "position_perplexity": parts}
    return row | numbers | {"device": DEVICE} | fields


def test_means_over_seeds_by_text_and_method() -> None:
    shorter = RETNET | {"sparsity.rate": 0.4, "train.steps": 30}
    rows = [
        evaluated(RETNET, 0, 100.0),
        evaluated(RETNET, 1, 104.0),
        evaluated(shorter, 0, 120.0),
        evaluated(RETNET, 0, 50.0, data=["other.txt"]),
        evaluated(RETNET | {"model.d_model": 336}, 0, 60.0, data=["other.txt"]),
    ]
    novel, other = position_tables(rows)
    ends = ("1 to 32", "33 to 64", "97 to 128", "225 to 256", "481 to 512")
    assert novel.header == ("model", "seeds", "perplexity", *(f"positions {end}" for end in ends))
    # Parts 1, 2, 4, 8 and 16; the two seeds are 4 apart.
    dense, sparse = novel.rows
    assert dense[0].startswith("retnet-1.3b: dense, ") and dense[1] == "2"
    assert dense[2:] == tuple(f"{x:.1f} ± 2.0" for x in (94, 102, 101, 99, 95, 87))
    assert sparse[0].startswith("retnet-1.3b: r = 0.4") and sparse[0].endswith(", 30 steps")
    assert sparse[1:3] == ("1", "112.0")
    assert novel.caption.startswith("novel.txt: 9,000 tokens, windows of 512 that advance by 256")
    assert other.rows[0][1:4] == ("1", "42.0", "50.0")
    assert other.rows[1][0].startswith("retnet-1.3b of width 336: dense, ")


def test_other_evaluations_are_not_in_the_table() -> None:
    loaded = {"model.path": "x", "data.row_length": 512}
    rows = [
        evaluated(RETNET, 0, 50.0, context=1024),  # longer than the rows of training
        evaluated(RETNET, 0, 50.0, options={"rope_type": "yarn"}),
        evaluated(RETNET, 0, 50.0, measure="passkey"),
        evaluated(RETNET, 0, 50.0, run=None),
        evaluated(loaded, 0, 50.0),
    ]
    assert position_tables(rows) == []
