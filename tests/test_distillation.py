"""Losses of distillation against formulas in float64, and the step that trains with a teacher."""

import dataclasses
import functools
import math
import re
from pathlib import Path
from typing import Any, get_args

import jax
import numpy as np
import pytest

from sat_jax.config import Config
from sat_jax.config_values import from_config_dict, load
from sat_jax.data.tokenizer import load_tokenizer
from sat_jax.interop import save_model
from sat_jax.models.build import layout_of
from sat_jax.models.decoder_config import DecoderConfig
from sat_jax.models.llama import LlamaConfig
from sat_jax.nn.distillation import (
    DIVERGENCES,
    DistillSettings,
    Divergence,
    TeacherStates,
    chunked_distillation_loss,
)
from sat_jax.train.costs import step_flops
from sat_jax.train.setup import set_up
from tests.conftest import ROOT
from tests.small_models import random_params
from tests.test_config import nested
from tests.tolerances import assert_close
from tests.user_errors import user_error

B, T, D, E, V = 2, 7, 6, 5, 11
W, TEMPERATURE = 0.3, 2.0


@functools.cache
def inputs() -> tuple[np.ndarray, ...]:
    """Hidden states and heads of student and teacher, targets and a mask."""
    rng = np.random.default_rng(0)
    shapes = ((B, T, D), (V, D), (B, T, E), (V, E))
    hidden, head, teacher_hidden, teacher_head = (
        rng.normal(size=shape).astype(np.float32) for shape in shapes
    )
    mask = rng.random((B, T)) < 0.7
    targets = rng.integers(0, V, (B, T)).astype(np.int32)
    return hidden, head, teacher_hidden, teacher_head, targets, mask


def softmax(logits: np.ndarray) -> np.ndarray:
    p = np.exp(logits)
    return p / p.sum(-1, keepdims=True)


def expected(divergence: str, p: np.ndarray, q: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The divergence of teacher p and student q, and q · its derivative with respect to q."""
    m = (p + q) / 2
    if divergence == "forward":
        return (p * np.log(p / q)).sum(-1), -p
    if divergence == "reverse":
        return (q * np.log(q / p)).sum(-1), q * (np.log(q / p) + 1)
    js = (p * np.log(p / m) + q * np.log(q / m)).sum(-1) / 2
    return js, q * np.log(q / m) / 2


def formula(divergence: str) -> tuple[float, float, float, np.ndarray, np.ndarray]:
    """The objective, its parts, and its gradients with respect to hidden and head, float64."""
    hidden, head, teacher_hidden, teacher_head = (x.astype(np.float64) for x in inputs()[:4])
    targets, mask = inputs()[4:]
    logits, one_hot = hidden @ head.T, np.eye(V)[targets]
    p = softmax(teacher_hidden @ teacher_head.T / TEMPERATURE)
    q, at_one = softmax(logits / TEMPERATURE), softmax(logits)
    value, by_q = expected(divergence, p, q)
    by_logits = (by_q - q * by_q.sum(-1, keepdims=True)) / TEMPERATURE
    cross_entropy = -np.log((at_one * one_hot).sum(-1))[mask].sum()
    d_logits = (1 - W) * (at_one - one_hot) + W * TEMPERATURE**2 * by_logits
    d_logits *= mask[..., None]
    total = (1 - W) * cross_entropy + W * TEMPERATURE**2 * value[mask].sum()
    by_head = np.einsum("btv,btd->vd", d_logits, hidden)
    return total, cross_entropy, value[mask].sum(), d_logits @ head, by_head


@functools.cache
def value_and_grad(divergence: Divergence, chunk: int, weight: float = W) -> Any:
    settings = DistillSettings(weight=weight, temperature=TEMPERATURE, divergence=divergence)

    def loss(*arrays: jax.Array) -> tuple[jax.Array, Any]:
        hidden, head, teacher_hidden, teacher_head, *rest = arrays
        teacher = TeacherStates(teacher_hidden, teacher_head)
        return chunked_distillation_loss(hidden, head, teacher, *rest, chunk, settings)

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3), has_aux=True))


def test_every_divergence_is_tested() -> None:
    assert set(DIVERGENCES) == {"forward", "reverse", "js"} == set(get_args(Divergence))


@pytest.mark.parametrize(("divergence", "chunk"), [("forward", 3), ("reverse", 64), ("js", 3)])
def test_values_and_gradients_equal_the_formula(divergence: Divergence, chunk: int) -> None:
    """In chunks that do not divide the row, and in one chunk. The teacher has no gradient."""
    total, cross_entropy, value, by_hidden, by_head = formula(divergence)
    (loss, parts), gradients = value_and_grad(divergence, chunk)(*inputs())
    for actual, desired in [(loss, total), (parts[0], cross_entropy), (parts[1], value)]:
        assert_close(actual, desired, "float32", "forward")
    assert_close(gradients[0], by_hidden, "float32", "backward")
    assert_close(gradients[1], by_head, "float32", "backward")
    assert not any(gradient.any() for gradient in gradients[2:])


def test_the_logits_of_a_whole_batch_never_exist_at_once() -> None:
    text = value_and_grad("js", 3).lower(*inputs()).compile().as_text()
    shapes = re.findall(r"\b(?:f32|s32|pred)\[([\d,]+)\]", text)
    largest = max(math.prod(map(int, shape.split(","))) for shape in shapes)
    assert largest == max(B * 3 * V, B * 9 * D, V * D) < B * T * V


TEACHER = LlamaConfig(
    vocab_size=260, d_model=16, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=4, d_ff=24,
    max_positions=32,
)  # fmt: skip


def write(model: DecoderConfig, directory: Path, tokenizer: str | None = None) -> Path:
    """Write a model with random weights, and a tokenizer if it has one."""
    save_model(layout_of(model).bind(random_params(model)), directory)
    if tokenizer is not None:
        load_tokenizer(tokenizer).save(directory)
    return directory


def settings(teacher: Path | str, **changes: Any) -> Config:
    """The tiny experiment, whose tokens are bytes."""
    values = {
        "data.sources": "LICENSE,experiments/README.md",
        "data.row_length": 32,
        "distill.teacher": teacher,
    }
    values |= {key.replace("__", "."): value for key, value in changes.items()}
    overrides = [f"{key}={value}" for key, value in values.items()]
    return load(f"{ROOT}/experiments/tiny.py:dense", overrides)


def test_a_weight_of_zero_needs_no_teacher() -> None:
    assert set_up(settings("nowhere", distill__weight=0), lambda _: None).teacher is None


def test_a_teacher_is_read_in_the_compute_dtype(tmp_path: Path) -> None:
    """But for vectors. Its tokenizer is compared if it has one."""
    lines: list[str] = []
    path = write(TEACHER, tmp_path / "teacher")
    teacher = set_up(settings(path, model__dtype="bfloat16"), lines.append).teacher
    assert teacher is not None
    dtypes = {path: str(array.dtype) for path, array in teacher.params.items()}
    assert dtypes["embed"] == dtypes["layers/mlp/up"] == "bfloat16"
    assert dtypes["final_norm"] == dtypes["layers/mlp_norm"] == "float32"
    assert f"distill.teacher {path} has no tokenizer to compare with that of the run" in lines


def test_teachers_that_are_refused(tmp_path: Path) -> None:
    other = tmp_path / "tokenizer.json"
    text = load_tokenizer("bytes", model_vocab_size=260).backend.to_str()
    other.write_text(text.replace('"a":97', '"a":98').replace('"b":98', '"b":97'))
    wide = dataclasses.replace(TEACHER, vocab_size=264)
    same = str(write(TEACHER, tmp_path / "bytes", "bytes"))
    for path, changes, message in (
        (
            write(wide, tmp_path / "wide"),
            {},
            "it has 264 tokens, and the trained model 260; accepted: equal vocabularies",
        ),
        (
            write(TEACHER, tmp_path / "other", str(other)),
            {},
            "its tokenizer is another one: token 97 is 'b', and 'a' in that of the run; accepted: a"
            " teacher with the same tokenizer",
        ),
        (same, {"data__row_length": 64}, "data.row_length 64 exceeds the model's 32 positions"),
    ):
        config = settings(path, **changes)
        said = user_error(lambda config=config: set_up(config, lambda _: None))
        assert said == f"distill.teacher {path}: {message}"
    lines: list[str] = []
    assert set_up(settings(same), lines.append).teacher is not None
    assert not any("distill.teacher" in line for line in lines)


@pytest.mark.parametrize(
    ("key", "value"), [("weight", 0.25), ("temperature", 2.0), ("divergence", "js")]
)
def test_settings_that_need_a_teacher(key: str, value: Any) -> None:
    said = user_error(lambda: from_config_dict(nested({f"distill.{key}": value})))
    assert said == f"distill.{key} {value!r} needs distill.teacher"


def test_the_forward_pass_of_the_teacher_is_counted() -> None:
    """By hand, for each token: products with weights, the logits, and attention to 33 / 2 keys."""
    config, student = settings("teacher"), dataclasses.replace(TEACHER, n_layers=1)
    added = step_flops(config, student, teacher=TEACHER) - step_flops(config, student)
    weights = 16 * (4 * 4 + 2 * 2 * 4 + 4 * 4) + 3 * 16 * 24
    assert added == 2 * (2 * weights + 2 * 2 * 16 * 33 / 2) + 2 * 260 * 16
