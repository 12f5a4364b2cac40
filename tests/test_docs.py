"""The reference of the documents has a line for every axis, and no line for another."""

import re
from typing import get_args

from sat_jax.config_values import keys
from sat_jax.sparsity.importance import METRICS
from sat_jax.sparsity.schedule import Schedule
from tests.conftest import ROOT

TEXT = (ROOT / "docs/sparsity.md").read_text()
ROWS = [line.split("|")[1] for line in TEXT.splitlines() if line.startswith("| `")]
NAMED = {name for row in ROWS for name in re.findall(r"`(\w+)`", row)}


def test_every_setting_and_every_metric_has_a_line() -> None:
    settings = {key.path.partition(".")[2] for key in keys() if key.path.startswith("sparsity.")}
    assert settings | METRICS.keys() == NAMED


def test_every_schedule_is_named() -> None:
    (line,) = [line for line in TEXT.splitlines() if line.startswith("| `schedule`")]
    assert {f"`{name}`" for name in get_args(Schedule)} <= set(re.findall(r"`\w+`", line))
