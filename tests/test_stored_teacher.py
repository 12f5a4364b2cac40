"""Stored tokens of a teacher: their loss, their order, and runs without the teacher in the step."""

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sat_jax.config_values import from_config_dict
from sat_jax.data.batches import open_split
from sat_jax.models.build import layout_of
from sat_jax.nn.distillation import (
    DIVERGENCES,
    DistillSettings,
    Divergence,
    TeacherStates,
    chunked_distillation_loss,
)
from sat_jax.nn.top_tokens import TopTokens, top_tokens
from sat_jax.train.checkpoint import find
from sat_jax.train.loop import train
from sat_jax.train.metrics import read_metrics
from sat_jax.train.setup import set_up
from tests.small_models import random_params
from tests.test_config import nested
from tests.test_distillation import TEACHER, TEMPERATURE, V, W, expected, inputs, settings, softmax
from tests.test_distillation import write as write_model
from tests.tolerances import assert_close
from tests.user_errors import user_error

K = 4


def value_and_grad(teacher: Any, divergence: Divergence) -> Any:
    hidden, head, _, _, *rest = inputs()
    how = DistillSettings(weight=W, temperature=TEMPERATURE, divergence=divergence)

    def loss(hidden: jax.Array, head: jax.Array) -> Any:
        return chunked_distillation_loss(hidden, head, teacher, *rest, 3, how)

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(hidden, head)


def of_teacher(k: int) -> TopTokens:
    _, _, hidden, head, *_ = map(jnp.asarray, inputs())
    return jax.jit(top_tokens, static_argnums=(2, 3, 4))(hidden, head, k, TEMPERATURE, 3)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_all_tokens_give_the_loss_of_the_teacher_in_the_step(divergence: Divergence) -> None:
    _, _, hidden, head, *_ = map(jnp.asarray, inputs())
    (loss, parts), gradients = value_and_grad(of_teacher(V), divergence)
    (desired, desired_parts), desired_gradients = value_and_grad(
        TeacherStates(hidden, head), divergence
    )
    assert_close(loss, desired, "float32", "forward")
    for actual, part in zip(parts, desired_parts, strict=True):
        assert_close(actual, part, "float32", "forward")
    for actual, gradient in zip(gradients, desired_gradients, strict=True):
        assert_close(actual, gradient, "float32", "backward")


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_other_tokens_are_one_outcome(divergence: Divergence) -> None:
    """By a formula in float64, with its gradient."""
    hidden, head, teacher_hidden, teacher_head = (x.astype(np.float64) for x in inputs()[:4])
    targets, mask = inputs()[4:]
    logits = hidden @ head.T
    p, q = (softmax(x / TEMPERATURE) for x in (teacher_hidden @ teacher_head.T, logits))
    ids = np.argsort(-p, axis=-1)[..., :K]
    group = np.full(p.shape, K)  # the outcome of each token
    np.put_along_axis(group, ids, np.broadcast_to(np.arange(K), ids.shape), -1)
    one_hot = np.eye(K + 1)[group]
    grouped_p, grouped_q = ((x[..., None] * one_hot).sum(-2) for x in (p, q))
    value, by_group = expected(divergence, grouped_p, grouped_q)
    by_q = by_group / grouped_q  # with respect to the probability of an outcome
    by_token = q * np.take_along_axis(by_q, group, -1)
    by_logits = (by_token - q * by_token.sum(-1, keepdims=True)) / TEMPERATURE
    at_one = softmax(logits)
    targets_one_hot = np.eye(V)[targets]
    d_logits = (1 - W) * (at_one - targets_one_hot) + W * TEMPERATURE**2 * by_logits
    d_logits *= mask[..., None]
    top = of_teacher(K)
    np.testing.assert_array_equal(top.ids, ids)
    assert_close(np.exp(top.log_p), grouped_p, "float32", "forward")
    (_, parts), (by_hidden, by_head) = value_and_grad(top, divergence)
    assert_close(parts.divergence, value[mask].sum(), "float32", "forward")
    assert_close(by_hidden, d_logits @ head, "float32", "backward")
    assert_close(by_head, np.einsum("btv,btd->vd", d_logits, hidden), "float32", "backward")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"distill.weight": 0.0}, "distill.weight 0.0: the teacher is not used"),
        ({"distill.hidden_weight": 1.0}, "distill.hidden_weight 1.0: hidden states are not stored"),
        ({"data.pose_length": 2048}, "data.pose_length 2048: positions change"),
    ],
)
def test_settings_that_are_refused(changes: dict[str, Any], message: str) -> None:
    values = {"distill.teacher": "x", "distill.topk": 3} | changes
    said = user_error(lambda: from_config_dict(nested(values)))
    assert said == f"distill.topk 3 excludes {message}"


CHANGES: dict[str, Any] = {"train__steps": 4, "train__eval_every": 0, "checkpoint__every": 2}
CHANGES |= {"train__measure_speed": False, "train__rows_per_step": 4}


@pytest.mark.slow
def test_stored_tokens_are_those_of_each_row(tmp_path: Path) -> None:
    """Also of the last batch, which has padding rows. They are computed once."""
    path = write_model(TEACHER, tmp_path / "teacher", "bytes")
    lines: list[str] = []
    count = len(open_split(set_up(settings(path, **CHANGES), lines.append).data, "train"))
    changes = CHANGES | {"train__rows_per_step": next(n for n in (4, 5, 7) if count % n)}
    task = set_up(settings(path, distill__topk=K, **changes), lines.append)
    assert task.top_tokens is not None and task.teacher is not None and not task.teacher.params
    rows = open_split(task.data, "train")
    everything = range(len(rows))
    batch, top = rows.batch(everything), task.top_tokens.of_rows(everything)
    model = layout_of(TEACHER).bind(random_params(TEACHER))
    logits = np.asarray(model(batch.tokens, batch.segment_ids, batch.positions), np.float64)
    p = softmax(logits - logits.max(-1, keepdims=True))
    chosen = np.take_along_axis(p, np.asarray(top.ids), -1)
    assert_close(np.exp(top.log_p[..., :K]), chosen, "float32", "forward")
    assert_close(chosen, -np.sort(-p, -1)[..., :K], "float32", "forward")
    assert_close(np.exp(top.log_p).sum(-1), np.ones(p.shape[:2]), "float32", "forward")
    (folder,) = [f for f in (task.data.path / "teacher").iterdir() if f.is_dir()]
    before = (folder / "ids.npy").stat().st_mtime_ns
    set_up(settings(path, distill__topk=K, **changes), lines.append)
    assert (folder / "ids.npy").stat().st_mtime_ns == before
    said = user_error(lambda: set_up(settings(path, distill__topk=261), lines.append))
    assert said == "distill.topk 261; accepted: 1 to 260, the size of the vocabulary"


@pytest.mark.slow
def test_runs_with_stored_tokens_equal_those_with_the_teacher(tmp_path: Path) -> None:
    """With all tokens of the vocabulary, in microbatches; and when a run continues."""
    path = write_model(TEACHER, tmp_path / "teacher", "bytes")
    changes = CHANGES | {"train__accumulate": 2, "distill__temperature": 2.0}
    records: list[list[dict[str, Any]]] = []
    for name, topk in (("stored", 260), ("step", None)):
        config = settings(path, distill__topk=topk, **changes)
        train(config, tmp_path / name, lambda _: None)
        metrics = read_metrics(tmp_path / name / "metrics.jsonl")
        records.append([record for record in metrics if "loss" in record])
    for key in ("loss", "divergence", "cross_entropy"):
        assert_close(*([r[key] for r in steps] for steps in records), "float32", "forward")
    stored, step = (
        json.loads((tmp_path / name / "summary.json").read_text()) for name in ("stored", "step")
    )
    assert stored["teacher_flops"] == 0 < step["teacher_flops"]
    assert stored["spent_flops"] == step["spent_flops"] - step["teacher_flops"]
    continued, finished = tmp_path / "continued", tmp_path / "stored"
    shutil.copytree(finished, continued)
    (continued / "summary.json").unlink()
    shutil.rmtree(continued / "checkpoints" / "4")
    lines: list[str] = []
    train(settings(path, distill__topk=260, **changes), continued, lines.append)
    assert "continuing after step 2" in lines
    last = find(finished / "checkpoints", 4)
    again = find(continued / "checkpoints", 4).read(last.leaves)
    for name, value in last.read(last.leaves).items():
        np.testing.assert_array_equal(again[name], value, err_msg=name)
