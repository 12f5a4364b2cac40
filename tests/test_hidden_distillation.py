"""Losses of hidden states against formulas in float64 and plain forward passes, and a run."""

import dataclasses
import shutil
from pathlib import Path
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open

from sat_jax.config_values import from_config_dict
from sat_jax.models.build import layout_of
from sat_jax.models.llama import LlamaConfig
from sat_jax.nn.decoder import Compute, Decoder
from sat_jax.nn.distillation import DistillSettings, distillation_loss
from sat_jax.nn.hidden_distillation import (
    HIDDEN_LOSSES,
    PROJECTION,
    HiddenLoss,
    HiddenSettings,
    hidden_loss,
    layer_pairs,
    projected_layout,
)
from sat_jax.nn.layout import Layout
from sat_jax.sparsity.execution.gather import Gather
from sat_jax.sparsity.execution.mask import Mask
from sat_jax.sparsity.plan import make_plan
from sat_jax.train.checkpoint import find
from sat_jax.train.costs import step_flops
from sat_jax.train.loop import train
from sat_jax.train.metrics import read_metrics
from sat_jax.train.setup import set_up
from tests.executions import assert_gradients_close
from tests.small_models import CONFIGS, batch, neurons, random_kept, random_params
from tests.test_config import nested
from tests.test_distillation import TEACHER, settings, write
from tests.tolerances import assert_close
from tests.user_errors import user_error

L, N, P, B, T, D, E = 3, 5, 2, 2, 4, 6, 7
PAIRS: dict[str, Any] = {"hidden_layers": (0, 2), "teacher_layers": (4, 1)}
STUDENT = CONFIGS["gqa"]
WIDE = dataclasses.replace(CONFIGS["mha"], d_model=24, n_layers=4)


def test_every_distance_is_tested() -> None:
    assert set(HIDDEN_LOSSES) == {"mse", "cosine"} == set(get_args(HiddenLoss))


@pytest.mark.parametrize("distance", ["mse", "cosine"])
def test_values_and_gradients_equal_the_formula(distance: HiddenLoss) -> None:
    """Only the chosen layers of the student have a gradient."""
    rng = np.random.default_rng(0)
    shapes = ((L, B, T, D), (N, B, T, E), (P, E, D))
    states, teacher, projections = (rng.normal(size=shape) for shape in shapes)
    mask = rng.random((B, T)) < 0.7
    d_states, d_projections, total = np.zeros_like(states), np.zeros_like(projections), 0.0
    for pair, (own, learned) in enumerate(zip((0, 2), (4, 1), strict=True)):
        x, t = states[own] @ projections[pair].T, teacher[learned]
        xt, xx, tt = ((a * b).sum(-1, keepdims=True) for a, b in ((x, t), (x, x), (t, t)))
        if distance == "mse":
            value, d_x = ((x - t) ** 2).sum(-1, keepdims=True) / tt, 2 * (x - t) / tt
        else:
            value, d_x = 1 - xt / np.sqrt(xx * tt), (xt / xx * x - t) / np.sqrt(xx * tt)
        d_x *= mask[..., None] / P
        total += (value[..., 0] * mask).sum() / P
        d_states[own] = d_x @ projections[pair]
        d_projections[pair] = np.einsum("bte,btd->ed", d_x, states[own])
    arrays = [jnp.asarray(a, jnp.float32) for a in (states, teacher, projections)]
    how = HiddenSettings(1.0, distance, **PAIRS)
    loss, gradients = jax.jit(
        jax.value_and_grad(lambda s, t, p: hidden_loss(s, t, p, mask, how), argnums=(0, 2))
    )(*arrays)
    assert_close(loss, total, "float32", "forward")
    assert_close(gradients[0], d_states, "float32", "backward")
    assert_close(gradients[1], d_projections, "float32", "backward")


def test_layers_of_the_teacher_are_at_the_same_depth() -> None:
    assert layer_pairs(HiddenSettings(), 3, 9) == ((0, 1, 2), (2, 5, 8))
    assert layer_pairs(HiddenSettings(), 3, 4) == ((0, 1, 2), (1, 2, 3))
    assert layer_pairs(HiddenSettings(), 4, 2) == ((0, 1, 2, 3), (0, 0, 1, 1))
    assert layer_pairs(HiddenSettings(hidden_layers=(1,)), 3, 9) == ((1,), (5,))
    for changes, message in (
        ({"hidden_layers": (3,)}, "distill.hidden_layers 3; accepted: 0 to 2"),
        ({"teacher_layers": (-1, 0, 0)}, "distill.teacher_layers -1; accepted: 0 to 8"),
        (
            {"teacher_layers": (1,)},
            "distill.teacher_layers has 1 layers for 3 of the student; accepted: one for each",
        ),
    ):
        how = HiddenSettings(**changes)
        assert user_error(lambda how=how: layer_pairs(how, 3, 9)) == message


def state_after(config: LlamaConfig, params: Any, layers: int) -> jax.Array:
    """The residual stream after some layers, of a model that has no others."""
    rows, layout = batch(config), layout_of(dataclasses.replace(config, n_layers=layers))
    model = layout.bind(
        {
            p: params[p][:layers] if leaf.in_layers else params[p]
            for p, leaf in layout.leaves.items()
        }
    )
    x = model.embed_tokens(rows.tokens, rows.positions)
    return model.apply_layers(x, rows.segment_ids, rows.positions)[0]


def loss_of(model: Decoder, teacher: Decoder, how: DistillSettings) -> tuple[jax.Array, Any]:
    total, parts, observed = distillation_loss(model, teacher, how, *batch(STUDENT))
    assert all(part == {} for part in observed)
    return total, parts


def test_the_loss_is_that_of_separate_forward_passes() -> None:
    """With recomputation, and the gradients of all parameters."""
    how = DistillSettings(hidden_weight=0.5, hidden_layers=(0, 2), weight=0.25)
    compute = Compute(remat="full", loss_chunk=4)
    layout = projected_layout(layout_of(STUDENT, compute), 2, WIDE.d_model)
    teacher, of_teacher = layout_of(WIDE).bind(random_params(WIDE)), random_params(WIDE)
    projections = np.random.default_rng(1).normal(size=layout.shapes[PROJECTION].shape) / 4
    params = random_params(STUDENT) | {PROJECTION: projections.astype(np.float32)}
    mask = batch(STUDENT).loss_mask

    def reference(params: Any) -> jax.Array:
        plain = layout_of(STUDENT).bind(params)
        total, _ = loss_of(plain, teacher, dataclasses.replace(how, hidden_weight=0.0))
        for number, (own, learned) in enumerate(((0, 1), (2, 3))):
            x = state_after(STUDENT, params, own + 1) @ params[PROJECTION][number].T
            t = state_after(WIDE, of_teacher, learned + 1)
            distances = jnp.sum((x - t) ** 2, -1) / jnp.sum(t**2, -1)
            total += 0.5 * jnp.sum(jnp.where(mask, distances, 0)) / 2
        return total

    def actual(params: Any) -> jax.Array:
        return loss_of(layout.bind(params), teacher, how)[0]

    expected, desired = jax.jit(jax.value_and_grad(reference))(params)
    total, gradients = jax.jit(jax.value_and_grad(actual))(params)
    assert_close(total, expected, "float32", "forward")
    assert np.any(gradients[PROJECTION])
    assert_gradients_close(gradients, desired)


def test_gathered_segments_have_the_states_of_masked_layers() -> None:
    """Without projections: the widths are equal."""
    how = DistillSettings(hidden_weight=1.0, hidden_loss="cosine")
    plan = make_plan(neurons(STUDENT), 0.4, 0.5, dense_layers=(1,))
    assert len(plan.segments) == 3
    kept, params = random_kept(STUDENT, plan), random_params(STUDENT)
    teacher = layout_of(CONFIGS["mha"]).bind(random_params(CONFIGS["mha"]))
    losses = []
    for kind in (Gather, Mask):
        execution = kind(layout_of(STUDENT), plan)
        compact, omitted = execution.compact(params, kept)
        model = execution.bind(execution.trained(compact, kept), compact, omitted, kept, {})
        losses.append(loss_of(model, teacher, how)[1]["hidden"])
    assert_close(*losses, "float32", "forward")


def test_projections_are_trained_leaves_of_a_layout_with_frozen_ones() -> None:
    layout: Layout[Decoder] = layout_of(STUDENT)
    frozen = {p: leaf._replace(trained=False) for p, leaf in layout.leaves.items()}
    projected = projected_layout(dataclasses.replace(layout, leaves=frozen), 2, 24)
    leaf = projected.leaves[PROJECTION]
    assert leaf.trained and leaf.axes == ("pair", "teacher_embed", "embed")
    assert {p: leaf for p, leaf in projected.leaves.items() if p != PROJECTION} == frozen


def test_floating_point_operations_of_projections() -> None:
    """Of 2 pairs of widths 16 and 24: forward, and backward to both operands; none without."""
    model, wide = TEACHER, dataclasses.replace(TEACHER, d_model=24)
    with_hidden = settings("x", distill__hidden_weight=1)
    for teacher, added in ((wide, 2 * 3 * 2 * 16 * 24), (TEACHER, 0)):
        before, after = (
            step_flops(config, model, teacher=teacher) for config in (settings("x"), with_hidden)
        )
        assert after - before == added


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_loss": "cosine"}, "distill.hidden_loss 'cosine' needs distill.hidden_weight abo"),
        ({"hidden_layers": (1,)}, "distill.hidden_layers (1,) needs distill.hidden_weight above 0"),
        ({"hidden_weight": 1.0, "weight": 0.0}, "distill.hidden_weight needs distill.weight above"),
    ],
)
def test_settings_that_are_refused(changes: dict[str, Any], message: str) -> None:
    values = {f"distill.{name}": value for name, value in changes.items()}
    said = user_error(lambda: from_config_dict(nested({"distill.teacher": "x", **values})))
    assert said.startswith(message)


def test_a_pipeline_and_layers_that_do_not_exist_are_refused(tmp_path: Path) -> None:
    values = {"mesh.pipeline": 2, "train.accumulate": 2, "train.rows_per_step": 2}
    values |= {"distill.teacher": "x", "distill.hidden_weight": 1.0}
    assert user_error(lambda: from_config_dict(nested(values))) == (
        "distill.hidden_weight excludes mesh.pipeline 2: stages do not return hidden states;"
        " accepted: 1"
    )
    path = write(dataclasses.replace(TEACHER, d_model=24), tmp_path / "teacher", "bytes")
    config = settings(path, distill__hidden_weight=1, distill__teacher_layers="0,5")
    said = user_error(lambda: set_up(config, lambda _: None))
    assert said == "distill.teacher_layers 5; accepted: 0 to 1"


@pytest.mark.slow
def test_a_run_continues_with_its_projections_and_exports_without_them(tmp_path: Path) -> None:
    path = write(dataclasses.replace(TEACHER, d_model=24), tmp_path / "teacher", "bytes")
    changes: dict[str, Any] = {"train__steps": 4, "checkpoint__every": 2}
    changes |= {"train__measure_speed": False, "train__eval_every": 0}
    config = settings(path, distill__hidden_weight=0.5, export__huggingface=True, **changes)
    run, continued = tmp_path / "run", tmp_path / "continued"
    train(config, run, lambda _: None)
    steps = [r for r in read_metrics(run / "metrics.jsonl") if "loss" in r]
    sums = [0.5 * (r["cross_entropy"] + r["divergence"] + r["hidden"]) for r in steps]
    assert_close([r["loss"] for r in steps], sums, "float32", "forward")
    stored = [find(run / "checkpoints", step) for step in (2, 4)]
    name = f"params/{PROJECTION}"
    early, late = (checkpoint.read([name])[name] for checkpoint in stored)
    assert early.shape == (2, 24, 64) and np.all(early != late)
    shutil.copytree(run, continued)
    (continued / "summary.json").unlink()
    shutil.rmtree(continued / "checkpoints" / "4")
    lines: list[str] = []
    train(config, continued, lines.append)
    assert "continuing after step 2" in lines
    again = find(continued / "checkpoints", 4).read(stored[1].leaves)
    for name, value in stored[1].read(stored[1].leaves).items():
        np.testing.assert_array_equal(again[name], value, err_msg=name)
    (file,) = (run / "huggingface").glob("*.safetensors")
    with safe_open(file, "numpy") as tensors:
        assert not any(PROJECTION in tensor for tensor in tensors.keys())
