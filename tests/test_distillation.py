"""Losses of distillation against formulas in float64, and the step that trains with a teacher."""

import functools
import math
import re
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sat_jax.nn.distillation import (
    DIVERGENCES,
    DistillSettings,
    Divergence,
    chunked_distillation_loss,
)
from sat_jax.nn.loss import chunked_cross_entropy
from tests.tolerances import assert_close

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
    settings = DistillSettings(weight, TEMPERATURE, divergence)

    def loss(*arrays: jax.Array) -> tuple[jax.Array, Any]:
        return chunked_distillation_loss(*arrays, chunk, settings)

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


def test_divergences_of_two_tokens_by_hand() -> None:
    """Of (1/2, 1/2) and (1/4, 3/4)."""
    p, q = jnp.log(jnp.asarray([0.5, 0.5])), jnp.log(jnp.asarray([0.25, 0.75]))
    forward = 0.5 * math.log(2) + 0.5 * math.log(2 / 3)
    reverse = 0.25 * math.log(1 / 2) + 0.75 * math.log(3 / 2)
    mixed = 0.5 * math.log(4 / 3) + 0.5 * math.log(4 / 5)
    mixed += 0.25 * math.log(2 / 3) + 0.75 * math.log(6 / 5)
    for name, value in {"forward": forward, "reverse": reverse, "js": mixed / 2}.items():
        assert_close(DIVERGENCES[name](p, q), value, "float32", "forward")  # type: ignore[index]


def test_the_logits_of_a_whole_batch_never_exist_at_once() -> None:
    def largest(chunk: int) -> int:
        text = value_and_grad("js", chunk).lower(*inputs()).compile().as_text()
        shapes = re.findall(r"\b(?:f32|s32|pred)\[([\d,]+)\]", text)
        return max(math.prod(map(int, shape.split(","))) for shape in shapes)

    assert largest(64) == B * T * V
    assert largest(3) == max(B * 3 * V, B * 9 * D, V * D) < B * T * V
