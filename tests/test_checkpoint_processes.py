"""Checkpoints across processes: kills, other meshes, several processes, a full disk."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sat_jax.train.checkpoint import find
from tests.conftest import ROOT, RunPython, xla_flags

pytestmark = pytest.mark.slow  # each test starts interpreters


def test_a_save_that_cannot_be_written_is_one_line(tmp_path: Path, run_python: RunPython) -> None:
    code = """
import resource, signal, sys
from pathlib import Path
import jax.numpy as jnp
from sat_jax.cli import run
from sat_jax.train.checkpoint import Checkpoints

def main():
    # Like a full disk: files are limited to 64 kB.
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    with Checkpoints(Path(sys.argv[1]), 1) as checkpoints:
        checkpoints.save(1, jnp.arange(8.0), {})
        checkpoints.wait()
        resource.setrlimit(resource.RLIMIT_FSIZE, (65536, -1))
        checkpoints.save(2, jnp.arange(1e6), {})
        if len(sys.argv) > 2:  # there is space again
            checkpoints._pending.exception()
            resource.setrlimit(resource.RLIMIT_FSIZE, (-1, -1))
            checkpoints.save(3, jnp.arange(1e6), {})

run(main)
"""
    result = run_python("-c", code, str(tmp_path))
    assert result.returncode == 2, result.stderr
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith(f"error: checkpoint {tmp_path / '2'}: not written: ")
    assert find(tmp_path).step == 1

    result = run_python("-c", code, str(tmp_path / "again"), "later")
    assert result.returncode == 0, result.stderr
    assert f"checkpoint {tmp_path / 'again/2'}: not written: " in result.stderr
    assert find(tmp_path / "again").step == 3


WRITER = """
import sys
from pathlib import Path
import jax.numpy as jnp
from sat_jax.train.checkpoint import Checkpoints

with Checkpoints(Path(sys.argv[1]), keep_last=2) as checkpoints:
    newest = checkpoints.newest()
    step = newest.step if newest else 0
    while True:
        step += 1
        state = {"params": {"x": jnp.full(1 << 20, step, jnp.float32)}}
        checkpoints.save(step, state, {"at": step})
        print(step, flush=True)
"""


def test_kill_at_any_moment_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    checkpoints = tmp_path / "checkpoints"
    seen = 0
    for delay in (0.0, 0.013, 0.031):
        child = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(checkpoints)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert child.stdout is not None
        started = int(child.stdout.readline())  # goes on from what the last kill left
        assert started > seen
        while int(child.stdout.readline()) < started + 4:
            pass
        time.sleep(delay)
        child.send_signal(signal.SIGKILL)
        child.wait()
        child.stdout.close()
        for path in checkpoints.iterdir():  # what has a step's name is whole, without exception
            if path.name.isdecimal():
                find(checkpoints, int(path.name))
        found = find(checkpoints)
        seen = found.step
        assert seen >= started + 2  # step n is announced once n - 1 is whole
        assert found.meta == {"at": seen}
        assert (found.read(["params/x"])["params/x"] == seen).all()


ON_MESH = """
import sys
from pathlib import Path
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from sat_jax.train.checkpoint import Checkpoints

shape, action = tuple(map(int, sys.argv[2].split("x"))), sys.argv[3]
mesh = jax.make_mesh(shape, ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)
spec = {"both": P("fsdp", "tensor"), "one": P(None, "tensor"), "all": P()}
shardings = {name: NamedSharding(mesh, s) for name, s in spec.items()}
random = np.random.default_rng(0)
values = {name: random.normal(size=(16, 24)).astype(np.float32) for name in spec}
with Checkpoints(Path(sys.argv[1]), 3) as checkpoints:
    if action == "save":
        state = jax.tree.map(jax.device_put, values, shardings)
        checkpoints.save(1, state, {})
        spoil = jax.jit(lambda s: jax.tree.map(lambda x: x * 0, s), donate_argnums=0)
        jax.block_until_ready(spoil(state))
    else:
        target = {
            name: jax.ShapeDtypeStruct((16, 24), jnp.float32, sharding=sharding)
            for name, sharding in shardings.items()
        }
        state = checkpoints.restore(target).state
        for name, value in values.items():
            assert state[name].sharding == shardings[name], state[name].sharding
            for shard in state[name].addressable_shards:
                assert (np.asarray(shard.data) == value[shard.index]).all(), name
        print("same")
"""


def test_restores_onto_another_mesh(tmp_path: Path, run_python: RunPython) -> None:
    saved = run_python("-W", "error", "-c", ON_MESH, str(tmp_path), "4x2", "save", devices=8)
    assert saved.returncode == 0, saved.stderr
    for shape, devices in (("2x3", 6), ("1x1", 1)):
        arguments = ("-W", "error", "-c", ON_MESH, str(tmp_path), shape, "restore")
        restored = run_python(*arguments, devices=devices)
        assert restored.stdout == "same\n", restored.stderr


TWO = """
import logging, sys
from pathlib import Path
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

index, port, directory = int(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(f"localhost:{port}", 2, index)
from sat_jax.errors import UserError
from sat_jax.train.checkpoint import Checkpoints

mesh = jax.make_mesh((4,), ("fsdp",), axis_types=(AxisType.Auto,))
sharding = NamedSharding(mesh, P("fsdp"))
target = {
    "split": jax.ShapeDtypeStruct((8, 3), jnp.float32, sharding=sharding),
    "whole": jax.ShapeDtypeStruct((5,), jnp.int32, sharding=NamedSharding(mesh, P())),
    "host": jax.ShapeDtypeStruct((2,), jnp.int32),
}

def make(step):
    split = np.arange(24, dtype=np.float32).reshape(8, 3) + step
    return {
        "split": jax.make_array_from_callback((8, 3), sharding, lambda i: split[i]),
        "whole": jax.device_put(np.full(5, step, np.int32), NamedSharding(mesh, P())),
        "host": np.full(2, step, np.int32),
    }

with Checkpoints(directory, keep_last=3) as checkpoints:
    assert checkpoints.newest() is None
    for step in (1, 2, 3):
        checkpoints.save(step, make(step), {"at": step})
if index == 0:
    (directory / "3" / "manifest.json").unlink()
with Checkpoints(directory, keep_last=3) as checkpoints:
    found = checkpoints.restore(target)
    assert found.step == 2 and found.meta == {"at": 2}
    for name, leaf in make(2).items():
        for got, want in zip(*(
            [leaf] if name == "host" else [s.data for s in leaf.addressable_shards]
            for leaf in (found.state[name], leaf)
        )):
            assert (np.asarray(got) == np.asarray(want)).all(), name
    checkpoints.save(3, make(3), {"at": 33})
    assert checkpoints.newest().meta == {"at": 33}
print("done")
"""


def test_two_processes_save_and_agree_on_the_step(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    env = {**os.environ, "XLA_FLAGS": xla_flags(2)}
    children = [
        subprocess.Popen(
            [sys.executable, "-c", TWO, str(index), str(port), str(tmp_path)],
            cwd=ROOT,
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]
    try:
        for child in children:
            out, errors = child.communicate(timeout=120)
            assert out.endswith("done\n"), errors
    finally:
        for child in children:
            child.kill()
