"""A calibration measures what it says, and a run takes its rates from it."""

import dataclasses
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sat_jax.config_values import load
from sat_jax.data.batches import in_order, open_split
from sat_jax.errors import UserError
from sat_jax.models.params import abstract, bind, numbered
from sat_jax.sparsity import budget
from sat_jax.sparsity.importance import METRICS, channel_evidence, head_evidence
from sat_jax.train.calibrate import calibrate
from sat_jax.train.probe import observed
from sat_jax.train.setup import Task, initial_params, set_up, shape_of
from scripts import calibrate as script
from tests.conftest import ROOT
from tests.tolerances import assert_close

ROWS = 6
SETTINGS = ["sparsity.rate=0.5", "train.rows_per_step=4", "train.accumulate=2"]


@pytest.fixture(autouse=True)
def in_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)  # the texts are the project's own


def task(*changes: str) -> Task:
    return set_up(load("experiments/tiny.py", [*SETTINGS, *changes]), print)


def test_a_rise_is_that_of_the_loss_without_what_is_omitted() -> None:
    given = task()
    said: list[str] = []
    measured = calibrate(given, 2, ROWS, said.append)
    assert (measured.borders, measured.rate_attention, measured.rate_mlp) == ((0, 1, 2), 0.5, 0.5)
    assert len(said) == 3

    params = initial_params(given)
    rows = list(in_order(open_split(given.data, "train"), 2, ROWS))
    graph, _ = abstract(given.model)

    @jax.jit
    def total(params: dict[str, Any], batch: Any) -> jax.Array:
        return bind(graph, numbered(params)).loss(*batch)[0]

    def loss(params: dict[str, Any]) -> float:
        tokens = sum(int(batch.loss_mask.sum()) for batch in rows)
        return sum(float(total(params, batch)) for batch in rows) / tokens

    stats = observed(bind(graph, numbered(params)), rows[0], ("outputs",))
    key = jax.random.key(0)
    scores = np.asarray(METRICS["output"].score(channel_evidence(params, stats, key)))
    for layer in range(2):
        omitted = np.argsort(scores[layer])[: scores.shape[1] // 2]
        down = jnp.asarray(params["layers/mlp/down"]).at[layer, omitted].set(0)
        rise = loss(params | {"layers/mlp/down": down}) - loss(params)
        assert_close(measured.mlp[layer], rise, "float32", "backward")
    scores = np.asarray(METRICS["output"].score(head_evidence(params, stats, "kv_group", key)))
    for layer in range(2):
        omitted = np.argmin(scores[layer])  # of two groups
        output = jnp.asarray(params["layers/attention/output"]).at[layer, omitted].set(0)
        rise = loss(params | {"layers/attention/output": output}) - loss(params)
        assert_close(measured.attention[layer], rise, "float32", "backward")


def test_the_rates_of_a_run_come_from_its_budget(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "budget.json"
    settings = [f"--config.{setting}" for setting in SETTINGS]
    line = ["--config=experiments/tiny.py", *settings, "--out", str(file), "--rows", "2"]
    monkeypatch.setattr(sys, "argv", ["calibrate", *line, "--blocks", "2"])
    script.main()
    *_, mean, told = capsys.readouterr().out.splitlines()
    assert mean.split() == ["mean", "0.50", "0.50"]
    assert f"--config.sparsity.budget={file}" in told
    measured = budget.load(file, shape_of(task().model), "output")
    with pytest.raises(UserError, match="metric 'output', and the run's is 'magnitude'"):
        task(f"sparsity.budget={file}", "sparsity.metric=magnitude")
    with pytest.raises(UserError, match="is there already"):
        script.main()
    # At another rate than it was made at.
    rises = {"attention": (0.1, 0.1), "mlp": (0.1, 0.3)}
    file.unlink()
    budget.save(dataclasses.replace(measured, **rises), file)
    given = task(f"sparsity.budget={file}", "sparsity.rate=0.4", "sparsity.rate_attention=0.5")
    plan = given.controller.rungs[0].plan
    kept = [(s.start, s.stop, s.kv_groups, s.channels) for s in plan.segments]
    assert given.model.d_ff == 128
    # 0.6 and 0.2 are 76.8 and 25.6 channels; nearest to the 102.4 asked for are 76 and 26.
    assert kept == [(0, 1, 1, 128 - 76), (1, 2, 1, 128 - 26)]
    assert_close(given.controller.rungs[0].rate_mlp, 0.4, "float32", "forward")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rows", "0"], "--rows 0; accepted: 1 or more"),
        (["--out", "none/x.json"], "--out none/x.json: there is no folder none"),
        (["--blocks", "3"], "--blocks 3; accepted: 1 to 2, the model's layers"),
        (["--config.sparsity.rate_mlp=0"], "a calibration is made at the rates of a run"),
        # Of two groups a fifth is none.
        (["--config.sparsity.rate=0.2"], "sparsity.rate_attention 0.2 omits nothing: it rounds"),
        (["--config.sparsity.rate_mlp=0.001"], "sparsity.rate_mlp 0.001 omits nothing: it rounds"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    line = ["--config=experiments/tiny.py", "--out", str(tmp_path / "x.json"), "--blocks", "1"]
    monkeypatch.setattr(sys, "argv", ["calibrate", *line, *arguments])
    with pytest.raises(UserError) as caught:
        script.main()
    assert str(caught.value).startswith(message)
    assert not (tmp_path / "x.json").exists()
