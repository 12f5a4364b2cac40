"""Compile the kernels ahead of time for absent accelerators: `make aot`.

  python -m kernels.aot --target h200 v5e v5p
  python -m kernels.aot --target h200 --candidates

Compiles every program at Llama-2 sizes (4,096 tokens, bfloat16, blocks of 128), the programs with
gradients for other numbers of tokens, dtypes and block sizes, and retention at the sizes of
RetNet-1.3B, whose kernel is for TPU. Uses XLA's compilers for TPU
(libtpu) and for CUDA (the plug-in, and ptxas of the CUDA toolkit on PATH). Fails if a kernel does
not compile, exceeds the memory of the chip or spills registers. Prints one line per program.

With --candidates it compiles all tiles that `kernels.tune` may try instead, in minutes. It lists
those that fail or spill registers, and those that do not fit, which tuning skips.

Needs the compilers, which `make aot` installs in a separate environment.
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

# Set before jax is imported, since the compilers would otherwise look for a device.
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
from kernels.block_sparse_matmul import tuned
from kernels.block_sparse_matmul.backends import KERNELS
from kernels.block_sparse_matmul.tiled import Tiled
from kernels.block_sparse_matmul.tiles import UnsupportedTiles
from kernels.block_sparse_matmul.workloads import LLAMA_2, Workload, operations, programs
from kernels.program import Program
from kernels.retention import IMPLEMENTATIONS as RETENTION
from kernels.retention import workloads as retention

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
# The implementation, and the description of the target for its compiler.
TARGETS: dict[str, tuple[str, dict[str, str]]] = {
    "h200": ("pallas_gpu", {"platform": "cuda", "target_config": _H200, "topology": "1x1x1"}),
    "v5e": ("pallas_tpu", {"platform": "tpu", "topology_name": "v5e:2x2"}),
    "v5p": ("pallas_tpu", {"platform": "tpu", "topology_name": "v5p:2x2x1"}),
}
_NO_REGISTER_REPORT = "the compiler reported no register counts"
# Compiled beside 4,096 tokens, blocks of 128 and bfloat16, where the target supports them. The two
# programs contain every operation of a training step.
_OTHER_SETTINGS: tuple[tuple[dict[str, Any], str], ...] = (
    ({"tokens": 1024}, "bfloat16"),
    ({"tokens": 65_536}, "bfloat16"),
    ({"block": 64}, "bfloat16"),
    ({"block": 256}, "bfloat16"),
    ({}, "float16"),
    ({}, "float32"),
)
_ALL_OPERATIONS = ("mlp_gradients", "mask_gradients")


def main() -> None:
    """Compile for each target, also after the failure of another."""
    parser = argparse.ArgumentParser(
        "python -m kernels.aot",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--target", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument(
        "--candidates", action="store_true", help="compile all tiles that tuning may try"
    )
    args = parser.parse_args()
    check_target = check_candidates if args.candidates else check
    sys.exit(sum(not check_target(target) for target in args.target))


def check(target: str) -> bool:
    """Compile every program for one target and print the results; return whether all succeeded."""
    sharding = _sharding(target)
    if sharding is None:
        return False
    success = True
    for name, program in _cases(TARGETS[target][0]):
        summary, failure = compile_program(program, sharding)
        if target == "h200" and not failure and "registers" not in summary:
            failure = _NO_REGISTER_REPORT
        print(f"{target}  {name}: {failure or summary}", flush=True)
        success &= failure is None
    return success


def check_candidates(target: str) -> bool:
    """Compile every operation with all tiles that tuning may try, and each program once.

    Prints a line per case and per failure. Returns whether all supported tiles succeeded.
    """
    sharding, kernels = _sharding(target), KERNELS[TARGETS[target][0]]
    if sharding is None:
        return False
    success, reported, workload = True, False, LLAMA_2[0]
    for block in (128, 64):
        if reason := kernels.refusal(jnp.dtype(jnp.bfloat16), workload.width, block):
            print(f"{target}  {reason}", flush=True)
            continue
        for pattern, operation in tuned.OPERATIONS:
            name, tokens = kernels.NAME, workload.tokens
            case = tuned.Case(name, pattern, operation, "bfloat16", block, tokens)
            result = _check_case(target, case, workload._replace(block=block), sharding)
            success, reported = success and result[0], reported or result[1]
    if target == "h200" and not reported:
        print(f"{target}: {_NO_REGISTER_REPORT}", flush=True)
    return success and (reported or target != "h200")


def _check_case(
    target: str, case: tuned.Case, workload: Workload, sharding: NamedSharding
) -> tuple[bool, bool]:
    """Return whether all tiles succeeded, and whether the compiler reported register counts.

    It does not report them again for a kernel that it has compiled in another program.
    """
    kernels, success, reported = KERNELS[case.backend], True, False
    compiled: set[str] = set()
    unsupported: dict[str, list[str]] = collections.defaultdict(list)
    name = f"{target}  {case.pattern}  {case.operation}  {case.block}"
    for tiles in tune.candidates(case):
        program = operations(workload, Tiled(kernels, tiles))[case.pattern, case.operation]
        try:
            with _on(sharding):
                program_hash = tune.program_hash(program)
        except UnsupportedTiles as error:
            unsupported[str(error)].append(tune.describe_tiles(tiles))
            continue
        if program_hash in compiled:
            continue
        compiled.add(program_hash)
        summary, failure = compile_program(program, sharding)
        reported |= "registers" in summary
        if failure:
            print(f"{name}  {tune.describe_tiles(tiles)}: {failure}", flush=True)
            success = False
    for reason, settings in unsupported.items():
        # The shortest has only the settings that cause the failure.
        shortest, others = min(settings, key=len), len(settings) - 1
        print(f"{name}  {shortest} (and {others} more) do not fit: {reason}", flush=True)
    print(f"{name}: {len(compiled)} programs", flush=True)
    return success, reported


def _cases(implementation: str) -> Iterator[tuple[str, Program]]:
    """Yield every program at the default settings, and two at other settings, with names."""
    for workload in LLAMA_2:
        for name, program in programs(workload, implementation).items():
            yield f"{workload.model}  {name}", program
    for changes, dtype in _OTHER_SETTINGS:
        workload = LLAMA_2[0]._replace(**changes)
        if KERNELS[implementation].refusal(jnp.dtype(dtype), workload.width, workload.block):
            continue
        available = programs(workload, implementation)
        setting = ", ".join(f"{name} {value}" for name, value in changes.items()) or dtype
        for name in _ALL_OPERATIONS:
            yield f"{workload.model}  {setting}  {name}", _cast(available[name], dtype)
    for dtype in ("bfloat16", "float32") if implementation in RETENTION else ():
        available = retention.programs(retention.RETNET_1_3B, implementation, dtype)
        for name, program in available.items():
            yield f"retnet-1.3b  {dtype}  {name}", program


def _cast(program: Program, dtype: str) -> Program:
    """Return the program with its floating-point arguments in another dtype."""

    def cast(a: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        floating = jnp.issubdtype(a.dtype, jnp.floating)
        return jax.ShapeDtypeStruct(a.shape, dtype if floating else a.dtype)

    return program._replace(arguments=jax.tree.map(cast, program.arguments))


def _sharding(target: str) -> NamedSharding | None:
    """Return a sharding on one device of the target; print an error and return None without one."""
    if reason := compiler_error(target):
        print(f"error: {target}: {reason}", file=sys.stderr)
        return None
    return _one_device(target)


def _one_device(target: str) -> NamedSharding:
    topology = topologies.get_topology_desc(**TARGETS[target][1])
    mesh = Mesh(np.array(topology.devices[:1]), ("device",))
    return NamedSharding(mesh, PartitionSpec())


def _on(sharding: NamedSharding) -> contextlib.AbstractContextManager[None]:
    """Return a context in which kernels use the tiles and the processors of the target."""
    return jax.sharding.use_abstract_mesh(sharding.mesh.abstract_mesh)


def compiler_error(target: str) -> str | None:
    """Return why the compiler of a target cannot be loaded, or None if it can."""
    try:
        topologies.get_topology_desc(**TARGETS[target][1])
    except Exception as error:
        return f"its compiler cannot be loaded: {type(error).__name__}: {error}".splitlines()[0]
    return None


def memory(
    target: str,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
    donated: tuple[int, ...] = (0,),
) -> Any:
    """Return XLA's analysis of the memory that a program needs on a target.

    `arguments` are shapes. Raises the exceptions of the compiler.
    """
    shapes = _placed(arguments, _one_device(target))
    with capture_stdout():
        # Autotuning needs a device.
        options: dict[str, Any] = {"xla_gpu_autotune_level": 0} if target == "h200" else {}
        compiled = jax.jit(function, donate_argnums=donated).lower(*shapes).compile(options)
    return compiled.memory_analysis()


def _placed(arguments: Any, sharding: NamedSharding) -> Any:
    return jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), arguments
    )


def compile_program(program: Program, sharding: NamedSharding) -> tuple[str, str | None]:
    """Return a summary of memory and registers, and the failure or None."""
    arguments = _placed(program.arguments, sharding)
    with _on(sharding), capture_stdout() as output:
        try:
            compiled = jax.jit(program.function).lower(*arguments).compile()
        except Exception as error:
            return "", f"{type(error).__name__}: {error}".splitlines()[0]
    text = output[0]
    memory = compiled.memory_analysis()
    registers = [int(n) for n in re.findall(r"Used (\d+) registers", text)]
    spills = [int(n) for n in re.findall(r"(\d+) bytes spill", text)]
    assert memory is not None
    summary = f"{memory.temp_size_in_bytes / 2**20:.0f} MiB of temporaries"
    if registers:
        summary += f", at most {max(registers)} registers"
    return summary, f"spills up to {max(spills)} bytes of registers" if any(spills) else None


@contextlib.contextmanager
def capture_stdout() -> Iterator[list[str]]:
    """Collect in a list the text that the body writes to standard output, compilers included."""
    output: list[str] = []
    sys.stdout.flush()
    with tempfile.TemporaryFile("w+") as file:
        stdout = os.dup(1)
        os.dup2(file.fileno(), 1)
        try:
            yield output
        finally:
            os.dup2(stdout, 1)
            os.close(stdout)
            file.seek(0)
            output.append(file.read())


if __name__ == "__main__":
    main()
