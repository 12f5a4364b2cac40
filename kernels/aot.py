"""Compiles the kernels for accelerators that are not there: `make aot`.

  python -m kernels.aot --target h200 v5e v5p
  python -m kernels.aot --target h200 --candidates

At Llama-2 sizes, with XLA's compiler for TPU (libtpu) and for CUDA (the plug-in, and ptxas from the
CUDA toolkit on PATH): 4,096 tokens in bfloat16 and blocks of 128, and of both directions other
numbers of tokens, dtypes and blocks. Fails where a kernel does not compile, asks for more memory on
the chip than there is, or spills registers. Prints a line a program. With --candidates it compiles
all tiles that `kernels.tune` may try instead, which takes minutes, and lists those that fail or
spill, and those that do not fit, which the search leaves out by itself. Needs the extra `aot`,
which `make aot` installs in an environment of its own.
"""

import argparse
import collections
import contextlib
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

# Before jax is imported: this machine has none of these devices.
os.environ.update(
    JAX_PLATFORMS="cpu",
    JAX_SKIP_CUDA_CONSTRAINTS_CHECK="1",
    MOSAIC_GPU_DUMP_PTXAS="1",
    TPU_SKIP_MDS_QUERY="1",
    TPU_ACCELERATOR_TYPE="v5litepod-4",
    TPU_WORKER_HOSTNAMES="localhost",
    TPU_WORKER_ID="0",
)

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from kernels import tune
from kernels.block_sparse_matmul import pallas_gpu, pallas_tpu, tuned
from kernels.block_sparse_matmul.arg_specs import LLAMA_2, Program, Spec, operations, programs
from kernels.block_sparse_matmul.tiled import Loops, Tiled
from kernels.block_sparse_matmul.tiles import Misfit

_H200 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 4800000000000 l2_cache_size: 62914560 clock_rate_ghz: 1.98
  device_memory_size: 150000000000 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 minor: 0 }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA" dnn_version_info { major: 9 minor: 12 } runtime_version { major: 13 }
device_description_str: "NVIDIA H200"
"""
# Implementation, and what describes the target to its compiler.
TARGETS: dict[str, tuple[str, dict[str, str]]] = {
    "h200": ("pallas_gpu", {"platform": "cuda", "target_config": _H200, "topology": "1x1x1"}),
    "v5e": ("pallas_tpu", {"platform": "tpu", "topology_name": "v5e:2x2"}),
    "v5p": ("pallas_tpu", {"platform": "tpu", "topology_name": "v5p:2x2x1"}),
}
_SILENT = "the compiler said nothing of registers"
_LOOPS: dict[str, Loops] = {"pallas_gpu": pallas_gpu, "pallas_tpu": pallas_tpu}
# Beside the usual 4,096 tokens, blocks of 128 and bfloat16; those that a target does not take are
# passed over. Two programs have every operation of a step in them.
_OTHERS: tuple[tuple[dict[str, Any], str], ...] = (
    ({"tokens": 1024}, "bfloat16"),
    ({"tokens": 65_536}, "bfloat16"),
    ({"block": 64}, "bfloat16"),
    ({"block": 256}, "bfloat16"),
    ({}, "float16"),
    ({}, "float32"),
)
_ALL_OPERATIONS = ("mlp, both ways", "mask, both ways")


def main() -> None:
    """Compiles for each target, though another failed."""
    parser = argparse.ArgumentParser(
        "python -m kernels.aot",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--target", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--candidates", action="store_true", help="all tiles that tuning may try")
    given = parser.parse_args()
    look = check_candidates if given.candidates else check
    sys.exit(sum(not look(target) for target in given.target))


def check(target: str) -> bool:
    """Compiles every program for one target and prints what became of it; whether all is well."""
    sharding = _sharding(target)
    if sharding is None:
        return False
    sound = True
    for name, program in _cases(TARGETS[target][0]):
        said, failure = _compiled(target, program, sharding)
        print(f"{target}  {name}: {failure or said}", flush=True)
        sound &= failure is None
    return sound


def check_candidates(target: str) -> bool:
    """Compiles every operation with all tiles that tuning may try, each program once, and prints a
    line a case and one a failure; whether all that fits is well."""
    sharding, loops = _sharding(target), _LOOPS[TARGETS[target][0]]
    if sharding is None:
        return False
    sound, spoken, spec = True, False, LLAMA_2[0]
    for block in (128, 64):
        if reason := loops.refusal(jnp.dtype(jnp.bfloat16), spec.width, block):
            print(f"{target}  {reason}", flush=True)
            continue
        for pattern, operation in tuned.OPERATIONS:
            case = tuned.Case(loops.NAME, pattern, operation, "bfloat16", block, spec.tokens)
            well, heard = _check_case(target, case, spec._replace(block=block), sharding)
            sound, spoken = sound and well, spoken or heard
    if target == "h200" and not spoken:
        print(f"{target}: {_SILENT}", flush=True)
    return sound and (spoken or target != "h200")


def _check_case(
    target: str, case: tuned.Case, spec: Spec, sharding: NamedSharding
) -> tuple[bool, bool]:
    """Whether all is well, and whether the compiler spoke of registers: of a kernel that it has
    compiled in another program it does not once more."""
    loops, sound, spoken = _LOOPS[case.backend], True, False
    seen: set[str] = set()
    unfit: dict[str, list[str]] = collections.defaultdict(list)
    where = f"{target}  {case.pattern}  {case.operation}  {case.block}"
    for tiles in tune.candidates(case):
        program = operations(spec, Tiled(loops, tiles))[case.pattern, case.operation]
        try:
            with jax.sharding.use_abstract_mesh(sharding.mesh.abstract_mesh):
                same = tune.identity(program)
        except Misfit as error:
            unfit[str(error)].append(tune.named(tiles))
            continue
        if same in seen:
            continue
        seen.add(same)
        with jax.sharding.use_abstract_mesh(sharding.mesh.abstract_mesh):
            said, failure = compiled(program, sharding)
        spoken |= "registers" in said
        if failure:
            print(f"{where}  {tune.named(tiles)}: {failure}", flush=True)
            sound = False
    for reason, several in unfit.items():
        # Other settings beside these do not help.
        shortest = min(several, key=len)
        print(f"{where}  {shortest} (and {len(several) - 1} more) do not fit: {reason}", flush=True)
    print(f"{where}: {len(seen)} programs", flush=True)
    return sound, spoken


def _cases(implementation: str) -> Iterator[tuple[str, Program]]:
    """Every program at the usual settings, and two at others."""
    for spec in LLAMA_2:
        for name, program in programs(spec, implementation).items():
            yield f"{spec.model}  {name}", program
    for changes, dtype in _OTHERS:
        spec = LLAMA_2[0]._replace(**changes)
        if _LOOPS[implementation].refusal(jnp.dtype(dtype), spec.width, spec.block):
            continue
        made = programs(spec, implementation)
        what = ", ".join(f"{name} {value}" for name, value in changes.items()) or dtype
        for name in _ALL_OPERATIONS:
            yield f"{spec.model}  {what}  {name}", _of_dtype(made[name], dtype)


def _of_dtype(program: Program, dtype: str) -> Program:
    def changed(a: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        floating = jnp.issubdtype(a.dtype, jnp.floating)
        return jax.ShapeDtypeStruct(a.shape, dtype if floating else a.dtype)

    return program._replace(arguments=jax.tree.map(changed, program.arguments))


def _sharding(target: str) -> NamedSharding | None:
    """On one device of the target; None: its compiler cannot be loaded, which is said."""
    if reason := missing(target):
        print(f"error: {target}: {reason}", file=sys.stderr)
        return None
    topology = topologies.get_topology_desc(**TARGETS[target][1])
    mesh = Mesh(np.array(topology.devices[:1]), ("one",))
    return NamedSharding(mesh, PartitionSpec())


def _compiled(target: str, program: Program, sharding: NamedSharding) -> tuple[str, str | None]:
    """As `compiled`, by the tiles that were measured for the target."""
    with jax.sharding.use_abstract_mesh(sharding.mesh.abstract_mesh):
        said, failure = compiled(program, sharding)
    if target == "h200" and not failure and "registers" not in said:
        failure = _SILENT
    return said, failure


def missing(target: str) -> str | None:
    """Why a target's compiler cannot be loaded; None: it can."""
    try:
        topologies.get_topology_desc(**TARGETS[target][1])
    except Exception as error:
        return f"its compiler cannot be loaded: {type(error).__name__}: {error}".splitlines()[0]
    return None


def memory(
    target: str,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
    given_up: tuple[int, ...] = (0,),
) -> Any:
    """XLA's analysis of the memory that a program needs on a target; `arguments` are shapes, of
    which some are given up. Raises what its compiler raises."""
    topology = topologies.get_topology_desc(**TARGETS[target][1])
    mesh = Mesh(np.array(topology.devices[:1]), ("one",))
    shapes = _placed(arguments, NamedSharding(mesh, PartitionSpec()))
    with captured():
        # Without a device there is nothing to try matrix products on.
        options: dict[str, Any] = {"xla_gpu_autotune_level": 0} if target == "h200" else {}
        done = jax.jit(function, donate_argnums=given_up).lower(*shapes).compile(options)
    return done.memory_analysis()


def _placed(arguments: Any, sharding: NamedSharding) -> Any:
    return jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), arguments
    )


def compiled(program: Program, sharding: NamedSharding) -> tuple[str, str | None]:
    """What the compiler says of memory and registers, and why the program is no good, or None."""
    arguments = _placed(program.arguments, sharding)
    with captured() as output:
        try:
            done = jax.jit(program.function).lower(*arguments).compile()
        except Exception as error:
            return "", f"{type(error).__name__}: {error}".splitlines()[0]
    text = output[0]
    memory = done.memory_analysis()
    registers = [int(n) for n in re.findall(r"Used (\d+) registers", text)]
    spills = [int(n) for n in re.findall(r"(\d+) bytes spill", text)]
    assert memory is not None
    said = f"{memory.temp_size_in_bytes / 2**20:.0f} MiB of temporaries"
    if registers:
        said += f", at most {max(registers)} registers"
    return said, f"spills up to {max(spills)} bytes of registers" if any(spills) else None


@contextlib.contextmanager
def captured() -> Iterator[list[str]]:
    """What is written to standard output meanwhile, by compilers too."""
    output: list[str] = []
    sys.stdout.flush()
    with tempfile.TemporaryFile("w+") as file:
        before = os.dup(1)
        os.dup2(file.fileno(), 1)
        try:
            yield output
        finally:
            os.dup2(before, 1)
            os.close(before)
            file.seek(0)
            output.append(file.read())


if __name__ == "__main__":
    main()
