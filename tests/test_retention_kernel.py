"""The retention kernel for TPU: interpreted on this machine, and lowered for a TPU."""

import functools
import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.retention import Times, parallel_retention, retention
from kernels.retention.workloads import RETNET_1_3B, programs
from sat_jax.errors import UserError
from sat_jax.models.presets import preset
from sat_jax.nn.retention import log_decays
from sat_jax.nn.retention_forms import State, timeline
from sat_jax.ops import retention_refusal
from sat_jax.train.programs import Programs
from sat_jax.train.setup import _check_retention
from tests.test_config import built
from tests.test_knobs import config_with, controller_of, programs_of
from tests.test_ops import lower
from tests.test_retention import SEGMENT_IDS
from tests.tolerances import assert_close

HEADS, KEY, VALUE = 2, 8, 12
# The first row continues the document of the memory, the second begins another.
BEFORE = State(jnp.zeros(0), jnp.asarray([1, 2], jnp.int32), jnp.asarray([5, 3], jnp.int32))
TIMES: Times = timeline(SEGMENT_IDS, BEFORE).times
kernel = functools.partial(retention, implementation="pallas_tpu")


def normal(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


@functools.partial(jax.jit, static_argnames=("function", "dtype"))
def with_gradients(function: Callable[..., Any], dtype: str, cotangents: Any) -> Any:
    """Return sums and memory, and the gradients of q, k, v and of the memory before the row."""
    shapes = [(*SEGMENT_IDS.shape, HEADS, size) for size in (KEY, KEY, VALUE)]
    qkv = [normal(seed, *shape).astype(dtype) for seed, shape in enumerate(shapes)]

    def call(q: Any, k: Any, v: Any, memory: Any) -> Any:
        return function(q, k, v, jnp.asarray(log_decays(HEADS), jnp.float32), memory, TIMES)

    results, vjp = jax.vjp(call, *qkv, normal(3, len(SEGMENT_IDS), HEADS, KEY, VALUE))
    return results, vjp(cotangents)


def random_cotangents() -> tuple[jax.Array, jax.Array]:
    return normal(4, *SEGMENT_IDS.shape, HEADS, VALUE), normal(5, 2, HEADS, KEY, VALUE)


@pytest.mark.parametrize(
    ("dtype", "chunk"),
    # 37 tokens: two full chunks and a part of one; a part of one.
    [("float32", 16), ("bfloat16", 16), ("float32", 64)],
)
def test_values_and_gradients(dtype: str, chunk: int) -> None:
    call = functools.partial(kernel, chunk=chunk)
    actual = jax.tree.leaves(with_gradients(call, dtype, random_cotangents()))
    desired = jax.tree.leaves(with_gradients(parallel_retention, dtype, random_cotangents()))
    direction: Any = "retention" if dtype == "float32" else "product"
    for a, b in zip(actual, desired, strict=True):
        assert a.dtype == b.dtype
        assert_close(a.astype(jnp.float32), b.astype(jnp.float32), dtype, direction)


CALL = functools.partial(kernel, chunk=16)


def test_no_gradient_between_documents() -> None:
    inside = np.zeros((*SEGMENT_IDS.shape, 1, 1), bool)
    inside[0, 20:33] = inside[1, 5:] = True
    sums, memory = random_cotangents()
    cotangents = jnp.where(inside, sums, 0), jnp.zeros_like(memory)
    _, (*gradients, of_memory) = with_gradients(CALL, "float32", cotangents)
    assert not np.any(of_memory)
    for gradient in gradients:
        assert not np.any(np.where(inside, 0, gradient))
        assert np.abs(gradient[0, 20]).max() > 0


def test_decays_are_masked_before_exponentiation() -> None:
    """Powers of pairs in the wrong order exceed float32 at this decay: they would be NaN."""
    *_, gradient = jax.jit(
        lambda q: jax.value_and_grad(lambda q: jnp.sum(one_head(q, -20.0)[0]))(q)
    )(jnp.ones((1, 16, 1, KEY)))
    assert_close(gradient, jnp.ones_like(gradient), "float32", "forward")  # of itself alone


def one_head(q: jax.Array, log_decay: float) -> tuple[jax.Array, jax.Array]:
    """One document whose keys and values are 1."""
    ones = jnp.ones((1, q.shape[1]), jnp.int32)
    memory, value = jnp.zeros((1, 1, KEY, 1)), jnp.ones((1, q.shape[1], 1, 1))
    log_decay_H = jnp.full(1, log_decay)
    return CALL(q, jnp.ones_like(q), value, log_decay_H, memory, timeline(ones).times)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_kernels_lower_at_the_size_of_a_published_model(dtype: str) -> None:
    for name, program in programs(RETNET_1_3B, "pallas_tpu", dtype).items():
        traced = jax.jit(program.function).trace(*program.arguments)
        text = traced.lower(lowering_platforms=("tpu",)).as_text()
        kernels = re.findall(r'custom_call @tpu_custom_call.*kernel_name = "(\w+)"', text)
        assert kernels == ["retention", "retention_gradients"][: len(kernels)]
        assert len(kernels) == (2 if name == "retention_gradients" else 1)


def test_second_derivatives_are_refused() -> None:
    def loss(q: jax.Array) -> jax.Array:
        return jnp.sum(jnp.sin(one_head(q, -1.0)[0]))

    with pytest.raises(TypeError, match="gradients of pallas_tpu cannot be differentiated"):
        jax.grad(lambda q: jnp.sum(jax.grad(loss)(q)))(jnp.ones((1, 16, 1, KEY)))


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("pallas_tpu", "float16", 8, 8, 16), "pallas_tpu: float16 arguments, accepted float32"),
        (("pallas_tpu", "float32", 8, 8, 40), "pallas_tpu: chunks of 40, accepted multiples of 16"),
        (("pallas_tpu", "bfloat16", 256, 432, 4096), "chunks of 4096 with heads of 256 and 432, "),
        (("pallas_gpu", "bfloat16", 8, 8, 16), "'pallas_gpu', accepted xla, pallas_tpu"),
        (("xla", "float16", 8, 8, 40), None),
    ],
)
def test_unsupported_arguments_are_refused(arguments: Any, reason: str | None) -> None:
    implementation, dtype, key_size, value_size, chunk = arguments
    q = jnp.zeros((1, 8, 1, key_size), dtype)
    v, memory = jnp.zeros((1, 8, 1, value_size), dtype), jnp.zeros((1, 1, key_size, value_size))
    times = timeline(jnp.ones((1, 8), jnp.int32)).times

    def call() -> Any:
        options = {"chunk": chunk, "implementation": implementation}
        return jax.eval_shape(
            lambda *arrays: retention(*arrays, times, **options), q, q, v, jnp.zeros(1), memory
        )

    if reason is None:
        call()
    else:
        with pytest.raises(ValueError, match=re.escape(reason)):
            call()


def test_a_kernel_does_not_run_on_another_platform() -> None:
    gpu = SimpleNamespace(platform="gpu")
    reason = retention_refusal("pallas_tpu", "float32", 8, 8, 16, gpu)
    assert reason == "pallas_tpu on gpu; accepted: tpu, cpu"


@pytest.mark.parametrize(
    ("name", "devices", "platform", "reason"),
    [
        ("tiny", 1, "tpu", "a llama model has no retention"),
        ("retnet-tiny", 2, "tpu", "2 devices, and the kernel runs on one"),
        ("retnet-tiny", 1, "gpu", "pallas_tpu on gpu; accepted: tpu, cpu"),
        ("retnet-tiny", 1, "tpu", None),
    ],
)
def test_models_and_devices(name: str, devices: int, platform: str, reason: str | None) -> None:
    config = built(model__preset=name, model__retention="pallas_tpu")
    device = SimpleNamespace(platform=platform)
    mesh: Any = SimpleNamespace(size=devices, devices=np.full(devices, device))
    if reason is None:
        _check_retention(config, preset(name), mesh)
        return
    with pytest.raises(UserError) as refused:
        _check_retention(config, preset(name), mesh)
    assert str(refused.value) == f"model.retention=pallas_tpu: {reason}; accepted: xla"


@pytest.mark.parametrize(("implementation", "count"), [("xla", 0), ("pallas_tpu", 2)])
def test_a_step_has_the_kernels_of_both_passes(
    implementation: str, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Programs, "_lower", staticmethod(functools.partial(lower, "tpu")))
    config: Any = config_with({"sparsity.rate": 0.0, "model.retention": implementation})
    model: Any = preset("retnet-tiny")
    run = programs_of(config, model)
    text = run.lower_step(controller_of(config, model).rungs[0].plan).as_text()
    run.close()
    assert text.count("custom_call @tpu_custom_call") == count
