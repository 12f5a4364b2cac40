"""Ahead-of-time compilation for absent devices: failures are printed, and the command fails."""

import os
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from kernels.block_sparse_matmul.tiles import GpuTiles
from kernels.block_sparse_matmul.workloads import LLAMA_2
from kernels.program import Program

SHARDING = NamedSharding(Mesh(np.array(jax.devices()[:1]), ("one",)), PartitionSpec())


@pytest.fixture
def aot() -> ModuleType:
    """The module; its environment variables do not affect other tests."""
    with mock.patch.dict(os.environ):
        from kernels import aot
    return aot


@pytest.fixture
def compilers(aot: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every compiler can be loaded."""
    topology = SimpleNamespace(devices=jax.devices())
    monkeypatch.setattr(aot.topologies, "get_topology_desc", lambda **_: topology)


def program(function: Callable[[jax.Array], jax.Array]) -> Program:
    return Program(function, (jax.ShapeDtypeStruct((4,), jnp.float32),), 1.0, 128)


def failing(_: jax.Array) -> jax.Array:
    raise NotImplementedError("no such tile\nand why")


def printing(text: str) -> Program:
    """Return a program that writes a text to standard output when traced, as the assembler does."""

    def function(x: jax.Array) -> jax.Array:
        os.write(1, text.encode())
        return x + 1

    return program(function)


def test_compiler_output_is_summarised(aot: ModuleType) -> None:
    failure = "NotImplementedError: no such tile"
    assert aot.compile_program(program(failing), SHARDING) == ("", failure)
    text = "Used 90 registers\n0 bytes spill stores\nUsed 168 registers"
    summary, failure = aot.compile_program(printing(text), SHARDING)
    assert summary.endswith("MiB of temporaries, at most 168 registers") and failure is None
    _, failure = aot.compile_program(
        printing("80 bytes spill stores, 40 bytes spill loads"), SHARDING
    )
    assert failure == "spills up to 80 bytes of registers"


@pytest.mark.slow
@pytest.mark.usefixtures("compilers")
def test_a_failing_program_fails_its_target(
    aot: ModuleType, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(aot, "_OTHER_SETTINGS", ())
    monkeypatch.setattr(aot.retention, "programs", lambda *_: {})
    programs = {"silent": lambda: printing(""), "good": lambda: printing("Used 9 registers")}
    monkeypatch.setattr(aot, "programs", lambda *_: {n: make() for n, make in programs.items()})
    assert aot.check("v5e")
    assert not aot.check("h200")
    out = capfd.readouterr().out
    assert f"h200  {LLAMA_2[0].model}  silent: the compiler reported no register counts" in out
    assert out.count("reported no register") == len(LLAMA_2)
    programs["silent"] = lambda: program(failing)
    assert not aot.check("v5e")
    assert "silent: NotImplementedError: no such tile\n" in capfd.readouterr().out


@pytest.mark.usefixtures("compilers")
def test_other_settings_are_compiled_where_a_target_supports_them(
    aot: ModuleType, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    seen: list[tuple[Any, ...]] = []

    def compile_program(program: Program, _: Any) -> tuple[str, None]:
        x = program.arguments[0]
        seen.append((x.shape[0], str(x.dtype), program.block))
        return "at most 9 registers", None

    monkeypatch.setattr(aot, "compile_program", compile_program)
    for target, others in (
        ("h200", [(4096, "bfloat16", 64), (4096, "float16", 128)]),
        (
            "v5e",
            [
                *((4096, "bfloat16", 256), (4096, "float32", 128)),
                *((8, dtype, None) for dtype in ("bfloat16", "float32")),  # rows of retention
            ],
        ),
    ):
        seen.clear()
        assert aot.check(target)
        expected = [(1024, "bfloat16", 128), (65_536, "bfloat16", 128), *others]
        assert seen[12:] == [case for case in expected for _ in range(2)]
        assert set(seen[:12]) == {(4096, "bfloat16", 128)}
    assert "h200  llama-2-7b  float16  mask_gradients: at most" in capfd.readouterr().out


@pytest.mark.usefixtures("compilers")
def test_candidates_of_tuning_are_compiled_once(
    aot: ModuleType, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The default tiles and those with six stages result in the same program."""
    large = GpuTiles(tile_m=512)
    candidates = [GpuTiles(), GpuTiles(stages=6), large, GpuTiles(tile_m=512, grid_tile_width=1)]
    monkeypatch.setattr(aot.tune, "candidates", lambda _: candidates)
    monkeypatch.setattr(aot.tuned, "OPERATIONS", (("rows", "swiglu_gradients"),))
    spill = "spills up to 8 bytes of registers"
    results = iter((("at most 9 registers", None), ("at most 9 registers", spill), ("", None)))
    monkeypatch.setattr(aot, "compile_program", lambda *_: next(results))
    monkeypatch.setattr(
        aot.KERNELS["pallas_gpu"], "refusal", lambda *_: None if _[2] == 128 else "too small"
    )
    assert aot.check_candidates("h200")
    reason = "2 × 256 × 128 sums per warpgroup, accepted at most 16384, and sizes that are"
    reason += " multiples of 64"
    name = "h200  rows  swiglu_gradients  128"
    assert capfd.readouterr().out.splitlines() == [
        f"{name}  tile_m 512 (and 1 more) do not fit: {reason}",
        f"{name}: 1 programs",
        "h200  too small",
    ]
    assert not aot.check_candidates("h200")
    assert f"{name}  default: {spill}\n" in capfd.readouterr().out
    assert not aot.check_candidates("h200")
    assert capfd.readouterr().out.endswith("h200: the compiler reported no register counts\n")


def test_a_missing_compiler(
    aot: ModuleType, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def missing(**_: str) -> None:
        raise RuntimeError("no libtpu")

    monkeypatch.setattr(aot.topologies, "get_topology_desc", missing)
    assert not aot.check("v5p")
    message = "error: v5p: its compiler cannot be loaded: RuntimeError: no libtpu\n"
    assert capfd.readouterr().err == message
