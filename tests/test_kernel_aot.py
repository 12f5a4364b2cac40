"""Compiling for devices that are not there: what fails is said, and the command fails with it."""

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

from kernels.block_sparse_matmul.arg_specs import LLAMA_2, Program
from kernels.block_sparse_matmul.tiles import GpuTiles

SHARDING = NamedSharding(Mesh(np.array(jax.devices()[:1]), ("one",)), PartitionSpec())


@pytest.fixture
def aot() -> ModuleType:
    """The command, whose settings for compilers stay its own."""
    with mock.patch.dict(os.environ):
        from kernels import aot
    return aot


@pytest.fixture
def described(aot: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every compiler is there."""
    topology = SimpleNamespace(devices=jax.devices())
    monkeypatch.setattr(aot.topologies, "get_topology_desc", lambda **_: topology)


def program(function: Callable[[jax.Array], jax.Array]) -> Program:
    return Program(function, (jax.ShapeDtypeStruct((4,), jnp.float32),), 1.0, 128)


def refused(_: jax.Array) -> jax.Array:
    raise NotImplementedError("no such tile\nand why")


def saying(text: str) -> Program:
    """As if the assembler had written that."""

    def function(x: jax.Array) -> jax.Array:
        os.write(1, text.encode())
        return x + 1

    return program(function)


def test_what_the_compilers_say(aot: ModuleType) -> None:
    failure = "NotImplementedError: no such tile"
    assert aot.compiled(program(refused), SHARDING) == ("", failure)
    text = "Used 90 registers\n0 bytes spill stores\nUsed 168 registers"
    said, failure = aot.compiled(saying(text), SHARDING)
    assert said.endswith("MiB of temporaries, at most 168 registers") and failure is None
    _, failure = aot.compiled(saying("80 bytes spill stores, 40 bytes spill loads"), SHARDING)
    assert failure == "spills up to 80 bytes of registers"


@pytest.mark.usefixtures("described")
def test_a_failure_of_one_program_is_that_of_its_target(
    aot: ModuleType, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(aot, "_OTHERS", ())
    made = {"silent": lambda: saying(""), "sound": lambda: saying("Used 9 registers")}
    monkeypatch.setattr(aot, "programs", lambda *_: {name: make() for name, make in made.items()})
    assert aot.check("v5e")
    assert not aot.check("h200")
    out = capfd.readouterr().out
    assert f"h200  {LLAMA_2[0].model}  silent: the compiler said nothing of registers" in out
    assert out.count("said nothing") == len(LLAMA_2)
    made["silent"] = lambda: program(refused)
    assert not aot.check("v5e")
    assert "silent: NotImplementedError: no such tile\n" in capfd.readouterr().out


@pytest.mark.usefixtures("described")
def test_other_settings_are_compiled_where_a_target_takes_them(
    aot: ModuleType, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    seen: list[tuple[Any, ...]] = []

    def compiled(program: Program, _: Any) -> tuple[str, None]:
        x = program.arguments[0]
        seen.append((x.shape[0], str(x.dtype), program.block))
        return "at most 9 registers", None

    monkeypatch.setattr(aot, "compiled", compiled)
    for target, others in (
        ("h200", [(4096, "bfloat16", 64), (4096, "float16", 128)]),
        ("v5e", [(4096, "bfloat16", 256), (4096, "float32", 128)]),
    ):
        seen.clear()
        assert aot.check(target)
        taken = [(1024, "bfloat16", 128), (65_536, "bfloat16", 128), *others]
        assert seen[12:] == [case for case in taken for _ in range(2)]
        assert set(seen[:12]) == {(4096, "bfloat16", 128)}
    assert "h200  llama-2-7b  float16  mask, both ways: at most" in capfd.readouterr().out


@pytest.mark.usefixtures("described")
def test_candidates_of_tuning_are_compiled_once(
    aot: ModuleType, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Default and six stages are one program."""
    tried = [GpuTiles(), GpuTiles(stages=6), GpuTiles(tall=512), GpuTiles(tall=512, snake=1)]
    monkeypatch.setattr(aot.tune, "candidates", lambda _: tried)
    monkeypatch.setattr(aot.tuned, "OPERATIONS", (("rows", "swiglu_gradients"),))
    spill = "spills up to 8 bytes of registers"
    found = iter((("at most 9 registers", None), ("at most 9 registers", spill), ("", None)))
    monkeypatch.setattr(aot, "compiled", lambda *_: next(found))
    monkeypatch.setattr(aot.pallas_gpu, "refusal", lambda *_: None if _[2] == 128 else "too small")
    assert aot.check_candidates("h200")
    reason = "2 × 256 × 128 sums of a warpgroup, accepted 16384 in all, of multiples of 64"
    where = "h200  rows  swiglu_gradients  128"
    assert capfd.readouterr().out.splitlines() == [
        f"{where}  tall 512 (and 1 more) do not fit: {reason}",
        f"{where}: 1 programs",
        "h200  too small",
    ]
    assert not aot.check_candidates("h200")
    assert f"{where}  default: {spill}\n" in capfd.readouterr().out
    assert not aot.check_candidates("h200")
    assert capfd.readouterr().out.endswith("h200: the compiler said nothing of registers\n")


def test_a_compiler_that_is_not_there(
    aot: ModuleType, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def missing(**_: str) -> None:
        raise RuntimeError("no libtpu")

    monkeypatch.setattr(aot.topologies, "get_topology_desc", missing)
    assert not aot.check("v5p")
    message = "error: v5p: its compiler cannot be loaded: RuntimeError: no libtpu\n"
    assert capfd.readouterr().err == message
