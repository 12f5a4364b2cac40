"""Cross-entropy in chunks against the naive one in float64."""

import functools
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sat_jax.nn.loss import chunked_cross_entropy
from tests.conftest import RunPython, slow_after
from tests.tolerances import assert_close

B, T, D, V = 3, 10, 8, 37
CHUNKS = [1, 3, 5, 10, 64]  # 3 does not divide T, 64 is larger


@functools.cache
def inputs(scale: float = 1.0) -> tuple[np.ndarray, ...]:
    """Hidden, head, targets and mask; the second row is masked out."""
    rng = np.random.default_rng(0)
    hidden = scale * rng.normal(size=(B, T, D)).astype(np.float32)
    head = rng.normal(size=(V, D)).astype(np.float32)
    mask = rng.random((B, T)) < 0.7
    mask[1] = False
    return hidden, head, rng.integers(0, V, (B, T)).astype(np.int32), mask


def naive(
    hidden: Any, head: Any, targets: np.ndarray, mask: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Loss and its gradients with respect to hidden and head, float64."""
    hidden, head = np.asarray(hidden, np.float64), np.asarray(head, np.float64)
    logits = hidden @ head.T
    logits -= logits.max(-1, keepdims=True)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    one_hot = np.eye(V)[targets]
    d_logits = (np.exp(log_p) - one_hot) * mask[..., None]
    loss = -(log_p * one_hot).sum(-1)[mask].sum()
    return loss, d_logits @ head, np.einsum("btv,btd->vd", d_logits, hidden)


@functools.cache
def value_and_grad(chunk: int) -> Any:
    """Return value and gradients of `0.25 · loss`, so that the cotangent is not 1."""

    def scaled(hidden: jax.Array, head: jax.Array, *rest: jax.Array) -> jax.Array:
        return 0.25 * chunked_cross_entropy(hidden, head, *rest, chunk)

    return jax.jit(jax.value_and_grad(scaled, argnums=(0, 1)))


@pytest.mark.parametrize("scale", [1.0, 300.0])
@pytest.mark.parametrize("chunk", CHUNKS)
def test_value_and_gradients_equal_the_naive_ones(chunk: int, scale: float) -> None:
    arguments = inputs(scale)
    loss, d_hidden, d_head = naive(*arguments)
    value, (by_hidden, by_head) = value_and_grad(chunk)(*arguments)
    assert_close(value, 0.25 * loss, "float32", "forward")
    assert_close(by_hidden, 0.25 * d_hidden, "float32", "backward")
    assert_close(by_head, 0.25 * d_head, "float32", "backward")
    assert not by_hidden[~arguments[3]].any()
    undifferentiated = jax.jit(chunked_cross_entropy, static_argnums=4)(*arguments, chunk)
    assert_close(undifferentiated, loss, "float32", "forward")


@pytest.mark.parametrize("chunk", [3, 10])
def test_in_bfloat16_logits_and_loss_are_float32(chunk: int) -> None:
    hidden, head, targets, mask = inputs()
    rounded = jnp.asarray(hidden, jnp.bfloat16), jnp.asarray(head, jnp.bfloat16)
    loss, d_hidden, d_head = naive(*rounded, targets, mask)
    value, (by_hidden, by_head) = value_and_grad(chunk)(*rounded, targets, mask)
    assert_close(value, 0.25 * loss, "float32", "forward")
    assert (value.dtype, by_hidden.dtype, by_head.dtype) == (np.float32, *[jnp.bfloat16] * 2)
    assert_close(by_hidden, 0.25 * d_hidden, "bfloat16", "backward")
    assert_close(by_head, 0.25 * d_head, "bfloat16", "backward")


def test_the_head_gradient_is_summed_in_float32() -> None:
    """A sum of 4,096 equal parts in bfloat16 would stop growing at 256 of them."""
    hidden = jnp.ones((1, 4096, 1), jnp.bfloat16)
    head = jnp.zeros((2, 1), jnp.bfloat16)
    zeros = jnp.zeros((1, 4096), jnp.int32)
    by_head = jax.grad(chunked_cross_entropy, 1)(hidden, head, zeros, zeros == 0, 1024)
    assert_close(by_head, [[-2048.0], [2048.0]], "bfloat16", "gradient_norm")


def test_with_all_tokens_masked_out_loss_and_gradients_are_zero() -> None:
    hidden, head, targets, mask = inputs()
    value, gradients = value_and_grad(3)(hidden, head, targets, np.zeros_like(mask))
    assert value == 0
    assert not any(gradient.any() for gradient in gradients)


def largest_array(chunk: int) -> int:
    """Elements of the largest array anywhere in the compiled value and gradients."""
    text = value_and_grad(chunk).lower(*inputs()).compile().as_text()
    shapes = re.findall(r"\b(?:f32|s32|pred|bf16)\[([\d,]+)\]", text)
    return max(math.prod(map(int, shape.split(","))) for shape in shapes)


def test_the_logits_of_a_whole_batch_never_exist_at_once() -> None:
    assert largest_array(T) == largest_array(64) == B * T * V
    assert largest_array(2) == max(B * 2 * V, B * T * D, V * D) < B * T * V


ON_EIGHT_DEVICES = """
import re, sys
import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from sat_jax.config import MeshConfig
from sat_jax.nn.loss import chunked_cross_entropy
from sat_jax.parallel.mesh import make_mesh
from sat_jax.parallel.rules import BATCH
from tests.tolerances import assert_close

data, fsdp, tensor, rows = map(int, sys.argv[1:])
mesh = make_mesh(MeshConfig(data=data, fsdp=fsdp, tensor=tensor))
rng = np.random.default_rng(0)
hidden = rng.normal(size=(rows, 12, 16)).astype(np.float32)
head = rng.normal(size=(32, 16)).astype(np.float32)
targets = rng.integers(0, 32, (rows, 12)).astype(np.int32)
arrays = (hidden, head, targets, rng.random((rows, 12)) < 0.7)


@jax.value_and_grad
def loss(arrays, rest):
    return chunked_cross_entropy(*arrays, *rest, 3)


expected = jax.jit(loss)(arrays[:2], arrays[2:])
rows_split = NamedSharding(mesh, P(*BATCH) if rows % (data * fsdp) == 0 else P())
split = (rows_split, NamedSharding(mesh, P("tensor", "fsdp")), rows_split, rows_split)
arrays = jax.device_put(arrays, split)
with jax.set_mesh(mesh):
    compiled = jax.jit(loss).lower(arrays[:2], arrays[2:]).compile()
value, gradients = compiled(arrays[:2], arrays[2:])
assert_close(value, expected[0], "float32", "forward")
for gradient, one in zip(gradients, expected[1], strict=True):
    assert_close(gradient, one, "float32", "backward")
loops, entry = compiled.as_text().split("ENTRY")
head_shape = rf"f32.{32 // tensor},16"
counts = [len(re.findall(head_shape + r".*? all-reduce\\(", part)) for part in (loops, entry)]
print(*counts)
"""


@pytest.mark.parametrize("mesh", slow_after(1, "222", "811", "421"))
def test_devices_exchange_the_gradient_of_the_head_once(mesh: str, run_python: RunPython) -> None:
    done = run_python("-c", ON_EIGHT_DEVICES, *mesh, "8", devices=8)
    assert (done.stdout.strip(), done.returncode) == ("0 1", 0), done.stderr


def test_rows_that_the_mesh_does_not_divide(run_python: RunPython) -> None:
    done = run_python("-c", ON_EIGHT_DEVICES, *"2223", devices=8)
    assert done.returncode == 0, done.stderr
