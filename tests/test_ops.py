"""Kernel execution: where it is refused, and how often it multiplies. That it agrees with the
others: test_invariants.py."""

import dataclasses
import functools
import re
from types import SimpleNamespace
from typing import Any, get_args

import jax
import pytest

from kernels.block_sparse_matmul.backends import IMPLEMENTATIONS
from sat_jax.errors import UserError
from sat_jax.models.presets import preset
from sat_jax.ops import BlockSparse, Implementation
from sat_jax.train.programs import Programs
from tests.test_config import built
from tests.test_knobs import KERNELS, MODEL, config_with, controller_of, programs_of


@pytest.mark.parametrize(
    ("kernels", "arguments", "reason"),
    [
        (
            BlockSparse(128, "pallas_tpu"),
            ("float32", 576, "gpu"),
            "pallas_tpu on gpu; accepted: tpu",
        ),
        (BlockSparse(1024, "pallas_tpu"), ("float32", 576, "tpu"), "blocks of 1024, accepted 128"),
        (BlockSparse(64), ("float32", 576, "cpu"), None),
        (BlockSparse(128, "pallas_tpu"), ("float32", 576, "cpu"), None),  # interpreted
        (BlockSparse(64, "pallas_tpu"), ("bfloat16", 576, "tpu"), "blocks of 64, accepted 128"),
        (BlockSparse(128, "pallas_gpu"), ("bfloat16", 576, "cpu"), "pallas_gpu on cpu"),
        (BlockSparse(128, "pallas_gpu"), ("bfloat16", 576, "gpu"), None),
        (BlockSparse(128, "pallas_gpu"), ("bfloat16", 520, "gpu"), "rows of 520, accepted mul"),
    ],
)
def test_what_kernels_take(kernels: BlockSparse, arguments: Any, reason: str | None) -> None:
    *shape, platform = arguments
    found = kernels.refusal(*shape, SimpleNamespace(platform=platform))
    assert found is None if reason is None else reason in str(found)


def test_kernels_for_hopper_want_hopper() -> None:
    ampere = SimpleNamespace(platform="gpu", compute_capability="8.0")
    reason = BlockSparse(128, "pallas_gpu").refusal("bfloat16", 576, ampere)
    assert reason == "pallas_gpu on compute capability 8.0; accepted: 9.0 (Hopper)"


def test_the_names_are_those_of_the_kernels() -> None:
    assert set(get_args(Implementation)) == set(IMPLEMENTATIONS)


def test_kernels_run_on_one_device() -> None:
    config = built(sparsity__rate=0.5, sparsity__execution="kernel", sparsity__block=64)
    mesh: Any = jax.sharding.AbstractMesh((2,), ("data",))
    with pytest.raises(UserError, match="'kernel' on 2 devices; accepted: one, or another"):
        Programs._kernels(config, preset("tiny"), mesh)


@pytest.mark.parametrize(
    ("implementation", "platform", "expected"),
    [
        ("xla", "cpu", (0, 11)),
        # SwiGLU and down; backward down's input, the gradients of gate and up, and x's, of one,
        # one or two products each. Those of weights are dense.
        ("pallas_tpu", "tpu", (5, 3)),
        ("pallas_gpu", "cuda", (5, 3)),
    ],
)
def test_a_step_computes_eleven_products_of_an_mlp(
    implementation: str, platform: str, expected: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a dense one does where layers run again, and not thirteen: kernels, and other products
    with as many neurons as are kept."""
    monkeypatch.setattr(BlockSparse, "refusal", lambda *_: None)  # no such device is here
    monkeypatch.setattr(Programs, "_lower", functools.partial(lowered, platform))
    settings = {"remat": "full", "dtype": "bfloat16", "kernels": implementation}
    config = config_with(KERNELS | {f"model.{name}": value for name, value in settings.items()})
    model = dataclasses.replace(MODEL, d_model=64, d_ff=768)  # half of which are kept
    programs = programs_of(config, model)
    text = programs.lower_step(controller_of(config, model).rungs[0].plan).as_text()
    programs.close()
    kernels = re.findall("custom_call @(tpu_custom_call|mosaic_gpu)", text)
    others = re.findall("dot_general .*[<x]384x", text)
    assert (len(kernels), len(others)) == expected


def lowered(platform: str, function: Any, *arguments: Any, **_: Any) -> jax.stages.Lowered:
    """In the place of `Programs._lower`, for another platform."""
    return jax.jit(function).trace(*arguments).lower(lowering_platforms=(platform,))
