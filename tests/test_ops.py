"""Kernel configurations: supported devices and shapes, and the number of matrix products per step.

`test_invariants.py` compares kernel execution with the other executions.
"""

import dataclasses
import functools
import re
from types import SimpleNamespace
from typing import Any, get_args

import jax
import pytest

from kernels.block_sparse_matmul.backends import IMPLEMENTATIONS
from sat_jax.errors import UserError
from sat_jax.models.build import layout_of
from sat_jax.models.presets import preset
from sat_jax.ops import Implementation, KernelConfig
from sat_jax.sparsity.choose import Criteria
from sat_jax.sparsity.execution.make import make_execution
from sat_jax.sparsity.plan import make_plan, neurons_of
from sat_jax.train.programs import Programs
from tests.test_config import built
from tests.test_knobs import KERNELS, MODEL, config_with, controller_of, programs_of


@pytest.mark.parametrize(
    ("config", "arguments", "reason"),
    [
        (
            KernelConfig(128, "pallas_tpu"),
            ("float32", 576, "gpu"),
            "pallas_tpu on gpu; accepted: tpu",
        ),
        (KernelConfig(1024, "pallas_tpu"), ("float32", 576, "tpu"), "blocks of 1024, accepted 128"),
        (KernelConfig(64), ("float32", 576, "cpu"), None),
        (KernelConfig(128, "pallas_tpu"), ("float32", 576, "cpu"), None),  # interpreted
        (KernelConfig(64, "pallas_tpu"), ("bfloat16", 576, "tpu"), "blocks of 64, accepted 128"),
        (KernelConfig(128, "pallas_gpu"), ("bfloat16", 576, "cpu"), "pallas_gpu on cpu"),
        (KernelConfig(128, "pallas_gpu"), ("bfloat16", 576, "gpu"), None),
        (KernelConfig(128, "pallas_gpu"), ("bfloat16", 520, "gpu"), "rows of 520, accepted mul"),
    ],
)
def test_unsupported_configurations_are_refused(
    config: KernelConfig, arguments: Any, reason: str | None
) -> None:
    *shape, platform = arguments
    refusal = config.refusal(*shape, SimpleNamespace(platform=platform))
    assert refusal is None if reason is None else reason in str(refusal)


def test_hopper_kernels_need_hopper() -> None:
    ampere = SimpleNamespace(platform="gpu", compute_capability="8.0")
    reason = KernelConfig(128, "pallas_gpu").refusal("bfloat16", 576, ampere)
    assert reason == "pallas_gpu on compute capability 8.0; accepted: 9.0 (Hopper)"


def test_implementation_names_equal_those_of_the_kernels() -> None:
    assert set(get_args(Implementation)) == set(IMPLEMENTATIONS)


def test_kernels_run_on_one_device() -> None:
    config = built(sparsity__rate=0.5, sparsity__execution="kernel", sparsity__block=64)
    mesh: Any = jax.sharding.AbstractMesh((2,), ("data",))
    layout = layout_of(preset("tiny"))
    plan = make_plan(neurons_of(layout), 0.5, 0.5, block=64)
    with pytest.raises(UserError, match="'kernel' on 2 devices; accepted: one, or another"):
        make_execution(config, layout, plan, mesh, Criteria())


@pytest.mark.parametrize(
    ("implementation", "platform", "expected"),
    [
        ("xla", "cpu", (0, 11)),
        # Kernels: swiglu (2 products), row (1); backward column (1), swiglu_gradients (2),
        # row_pairs (2). The three products of weight gradients are dense.
        ("pallas_tpu", "tpu", (5, 3)),
        ("pallas_gpu", "cuda", (5, 3)),
    ],
)
def test_a_step_computes_eleven_products_of_an_mlp(
    implementation: str, platform: str, expected: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many as in a dense step with full rematerialisation, not thirteen.

    Counts kernels and other products of the size of the kept channels.
    """
    monkeypatch.setattr(KernelConfig, "refusal", lambda *_: None)  # this machine has no such device
    monkeypatch.setattr(Programs, "_lower", staticmethod(functools.partial(lower, platform)))
    settings = {"remat": "full", "dtype": "bfloat16", "kernels": implementation}
    config = config_with(KERNELS | {f"model.{name}": value for name, value in settings.items()})
    model = dataclasses.replace(MODEL, d_model=64, d_ff=768)  # 384 kept channels
    programs = programs_of(config, model)
    text = programs.lower_step(controller_of(config, model).rungs[0].plan).as_text()
    programs.close()
    kernels = re.findall("custom_call @(tpu_custom_call|mosaic_gpu)", text)
    others = re.findall("dot_general .*[<x]384x", text)
    assert (len(kernels), len(others)) == expected


def lower(platform: str, function: Any, *arguments: Any, **_: Any) -> jax.stages.Lowered:
    """Replacement of `Programs._lower` that lowers for another platform."""
    return jax.jit(function).trace(*arguments).lower(lowering_platforms=(platform,))
