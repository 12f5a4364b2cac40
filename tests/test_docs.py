"""The reference of the documents has a line for every axis, and no line for another."""

import re
from typing import get_args

from sat_jax.compress.methods import METHODS
from sat_jax.config_values import keys
from sat_jax.sparsity.importance import METRICS
from sat_jax.sparsity.schedule import Schedule
from tests.conftest import ROOT

TEXT = (ROOT / "docs/sparsity.md").read_text()
SETTINGS = {key.path.partition(".")[2] for key in keys() if key.path.startswith("sparsity.")}
OF_WEIGHTS = {name for name in SETTINGS if name.startswith("weights.")}


def named(text: str) -> set[str]:
    """Return the names in the first column of the tables of a document."""
    rows = [line.split("|")[1] for line in text.splitlines() if line.startswith("| `")]
    return {name for row in rows for name in re.findall(r"`([\w.]+)`", row)}


def test_every_setting_and_every_metric_has_a_line() -> None:
    assert (SETTINGS - OF_WEIGHTS) | METRICS.keys() == named(TEXT)


def test_every_setting_of_block_sparse_matrices_has_a_line() -> None:
    assert named((ROOT / "docs/s2d.md").read_text()) == OF_WEIGHTS


def test_every_compression_method_has_a_line() -> None:
    text = (ROOT / "docs/compression.md").read_text()
    assert [name for name in METHODS if f"\n| `{name}` |" not in text] == []


def test_every_schedule_is_named() -> None:
    (line,) = [line for line in TEXT.splitlines() if line.startswith("| `schedule`")]
    assert {f"`{name}`" for name in get_args(Schedule)} <= set(re.findall(r"`\w+`", line))
