"""Compiles the kernels for accelerators that are not there: `make aot`.

  python -m kernels.aot --target h200 v5e v5p

At Llama-2 sizes, with XLA's compiler for TPU (libtpu) and for CUDA (the plug-in, and ptxas from the
CUDA toolkit on PATH). Fails where a kernel does not compile, asks for more memory on the chip than
there is, or spills registers. Prints a line a program. Needs the extra `aot`, which `make aot`
installs in an environment of its own.
"""

import argparse
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
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from kernels.block_sparse_matmul.arg_specs import LLAMA_2, Program, programs

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


def main() -> None:
    """Compiles for each target, though another failed."""
    parser = argparse.ArgumentParser(
        "python -m kernels.aot",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--target", nargs="+", choices=TARGETS, default=list(TARGETS))
    targets = parser.parse_args().target
    sys.exit(sum(not check(target) for target in targets))


def check(target: str) -> bool:
    """Compiles every program for one target and prints what became of it; whether all is well."""
    implementation, description = TARGETS[target]
    if reason := missing(target):
        print(f"error: {target}: {reason}", file=sys.stderr)
        return False
    topology = topologies.get_topology_desc(**description)
    mesh = Mesh(np.array(topology.devices[:1]), ("one",))
    sound = True
    for spec in LLAMA_2:
        for name, program in programs(spec, implementation).items():
            with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # its tiles, where measured
                said, failure = compiled(program, NamedSharding(mesh, PartitionSpec()))
            if target == "h200" and not failure and "registers" not in said:
                failure = "the compiler said nothing of registers"
            print(f"{target}  {spec.model}  {name}: {failure or said}", flush=True)
            sound &= failure is None
    return sound


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
    return said, f"spills {sum(spills)} bytes of registers" if any(spills) else None


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
