"""The retention kernel for TPU: interpreted on this machine, and lowered for a TPU."""

import functools
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.program import Program
from kernels.retention import Operands, Times, benchmark, parallel_retention, retention
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
# By chunk. Each is one object, so that tests share compiled programs.
KERNELS = {
    chunk: functools.partial(retention, implementation="pallas_tpu", chunk=chunk)
    for chunk in (16, 64)
}


def normal(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


@functools.partial(jax.jit, static_argnames=("function", "dtype"))
def with_gradients(function: Callable[..., Any], dtype: str, cotangents: Any) -> Any:
    """Return sums and memory, and the gradients of q, k, v and of the memory before the row."""
    shapes = [(*SEGMENT_IDS.shape, HEADS, size) for size in (KEY, KEY, VALUE)]
    qkv = [normal(seed, *shape).astype(dtype) for seed, shape in enumerate(shapes)]

    def call(q: Any, k: Any, v: Any, memory: Any) -> Any:
        log_decay = jnp.asarray(log_decays(HEADS), jnp.float32)
        return function(Operands(q, k, v, log_decay, memory, TIMES))

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
    actual = jax.tree.leaves(with_gradients(KERNELS[chunk], dtype, random_cotangents()))
    desired = jax.tree.leaves(with_gradients(parallel_retention, dtype, random_cotangents()))
    direction: Any = "retention" if dtype == "float32" else "product"
    for a, b in zip(actual, desired, strict=True):
        assert a.dtype == b.dtype
        assert_close(a.astype(jnp.float32), b.astype(jnp.float32), dtype, direction)


def test_no_gradient_between_documents() -> None:
    inside = np.zeros((*SEGMENT_IDS.shape, 1, 1), bool)
    inside[0, 20:33] = inside[1, 5:] = True
    sums, memory = random_cotangents()
    cotangents = jnp.where(inside, sums, 0), jnp.zeros_like(memory)
    _, (*gradients, of_memory) = with_gradients(KERNELS[16], "float32", cotangents)
    assert not np.any(of_memory)
    for gradient in gradients:
        assert not np.any(np.where(inside, 0, gradient))
        assert np.abs(gradient[0, 20]).max() > 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_kernels_lower_at_the_size_of_a_published_model(dtype: str) -> None:
    for name, program in programs(RETNET_1_3B, "pallas_tpu", dtype).items():
        traced = jax.jit(program.function).trace(*program.arguments)
        text = traced.lower(lowering_platforms=("tpu",)).as_text()
        kernels = re.findall(r'custom_call @tpu_custom_call.*kernel_name = "(\w+)"', text)
        assert kernels == ["retention", "retention_gradients"][: len(kernels)]
        assert len(kernels) == (2 if name == "retention_gradients" else 1)


def test_second_derivatives_are_refused() -> None:
    times, memory = timeline(jnp.ones((1, 16), jnp.int32)).times, jnp.zeros((1, 1, KEY, KEY))

    def loss(q: jax.Array) -> jax.Array:
        sums, _ = KERNELS[16](Operands(q, q, q, jnp.zeros(1), memory, times))
        return jnp.sum(jnp.sin(sums))

    with pytest.raises(TypeError, match="gradients of pallas_tpu cannot be differentiated"):
        jax.eval_shape(jax.grad(lambda q: jnp.sum(jax.grad(loss)(q))), jnp.ones((1, 16, 1, KEY)))


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
            lambda *arrays: retention(Operands(*arrays, times), **options),
            q,
            q,
            v,
            jnp.zeros(1),
            memory,
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


def test_benchmark(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Both implementations are timed where a TPU is the default device, and refusals are rows."""
    out = tmp_path / "rows.jsonl"
    monkeypatch.setattr(benchmark, "RETNET_1_3B", RETNET_1_3B._replace(heads=1, value_size=8))
    monkeypatch.setattr(benchmark.jax, "default_backend", lambda: "tpu")
    monkeypatch.setattr(benchmark.measure, "seconds", lambda program, _: seconds(program))
    sizes = ["--rows", "1", "--length", "16", "--chunk", "16", "40"]
    monkeypatch.setattr(sys, "argv", ["benchmark", "--out", str(out), *sizes])
    benchmark.main()
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(rows) == 16 and {row["device"]["kind"] for row in rows} == {"cpu"}
    # A token's products: 8.5 pairs of 256 + 8 entries, a memory of 256 · 8 and its use; 1 MAC = 2.
    assert {row["flops"] for row in rows if row["chunk"] == 16} == {
        n * 16 * 2 * (8.5 * 264 + 2 * 256 * 8) for n in (1, 3)
    }
    failed = {(row["implementation"], row["chunk"]) for row in rows if "error" in row}
    assert failed == {("pallas_tpu", 40)}
    lines = capsys.readouterr().out
    assert "retention_gradients  pallas_tpu  float32  16: 2000.000 ms, 0.00 TFLOP/s" in lines
    assert (
        "retention  pallas_tpu  bfloat16  40: ValueError: implementation pallas_tpu: chu" in lines
    )


def seconds(program: Program) -> float:
    jax.eval_shape(program.function, *program.arguments)
    return 2.0


@pytest.mark.parametrize(
    ("implementation", "sparsity", "count"),
    [
        ("xla", {"sparsity.rate": 0.0}, 0),
        ("pallas_tpu", {"sparsity.rate": 0.0}, 2),
        # One more forward pass: of the omitted heads.
        ("pallas_tpu", {"sparsity.rate": 0.5, "sparsity.passes": "backward"}, 3),
    ],
)
def test_a_step_has_the_kernels_of_both_passes(
    implementation: str, sparsity: Any, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Programs, "_lower", staticmethod(functools.partial(lower, "tpu")))
    config: Any = config_with({"model.retention": implementation} | sparsity)
    model: Any = preset("retnet-tiny")
    run = programs_of(config, model)
    text = run.lower_step(controller_of(config, model).rungs[0].plan).as_text()
    run.close()
    assert text.count("custom_call @tpu_custom_call") == count
