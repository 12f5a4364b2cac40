"""Compiling for devices that are not there: what fails is said, and the command fails with it."""

import os
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from kernels.block_sparse_matmul.arg_specs import LLAMA_2, Program

SHARDING = NamedSharding(Mesh(np.array(jax.devices()[:1]), ("one",)), PartitionSpec())


@pytest.fixture
def aot() -> ModuleType:
    """The command, whose settings for compilers stay its own."""
    with mock.patch.dict(os.environ):
        from kernels import aot
    return aot


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
    assert failure == "spills 120 bytes of registers"


def test_a_failure_of_one_program_is_that_of_its_target(
    aot: ModuleType, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    described = SimpleNamespace(devices=jax.devices())
    monkeypatch.setattr(aot.topologies, "get_topology_desc", lambda **_: described)
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


def test_a_compiler_that_is_not_there(
    aot: ModuleType, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def missing(**_: str) -> None:
        raise RuntimeError("no libtpu")

    monkeypatch.setattr(aot.topologies, "get_topology_desc", missing)
    assert not aot.check("v5p")
    message = "error: v5p: its compiler cannot be loaded: RuntimeError: no libtpu\n"
    assert capfd.readouterr().err == message
