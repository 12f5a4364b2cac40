"""Strict runtime for every test, here and in the processes that tests start."""

import gc
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest

# Before anything imports jax, and inherited by child processes.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"

import jax

jax.config.update("jax_numpy_rank_promotion", "raise")  # a plugin may have imported jax earlier

# The same examples each time, on however slow a machine: a change is judged by what it changes.
# `pytest --hypothesis-profile=search` looks for new ones.
hypothesis.settings.register_profile("search", deadline=None)
hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None)
hypothesis.settings.load_profile("repeatable")


# Before jax 0.11, XLA has other emitters of fusions than those of users, which compile faster and
# round differently. Comparisons bit by bit are made with those of users.
_HAS_OTHER_EMITTERS = jax.__version_info__ < (0, 11)
EMITTERS_OF_USERS = {"xla_cpu_use_fusion_emitters": True} if _HAS_OTHER_EMITTERS else {}


def pytest_configure(config: pytest.Config) -> None:
    """XLA optimizes little, here and in child processes: small models compile for longer than they
    run. Real weights are what users run, as users run them."""
    if config.option.markexpr != "real":
        os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
        jax.config.update("jax_disable_most_optimizations", True)
        if _HAS_OTHER_EMITTERS:
            fast = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
            os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {fast}".strip()
    # Tracing allocates many objects that live: collections at the default rate take a tenth of the
    # time.
    gc.set_threshold(100_000, 50, 100)


ROOT = Path(__file__).resolve().parent.parent

RunPython = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Prepared data and compiled programs of this session; the user's own cache is left alone."""
    path = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SAT_JAX_CACHE", str(path))
        yield path


@pytest.fixture(scope="module", autouse=True)
def compiled() -> Iterator[None]:
    """Programs that a file compiled are freed after it: each maps memory several times, and Linux
    ends a process at 65,530 maps."""
    yield
    jax.clear_caches()


def slow_after(count: int, *cases: Any) -> list[Any]:
    """Return the cases of a test, tuples of arguments or single ones; those after the first `count`
    are slow: on the newest jax, which runs no slow tests, a few cases stand for all."""
    rest = (case if isinstance(case, tuple) else (case,) for case in cases[count:])
    return [*cases[:count], *(pytest.param(*case, marks=pytest.mark.slow) for case in rest)]


def xla_flags(devices: int) -> str:
    """Return the XLA_FLAGS of a process with so many virtual CPU devices."""
    return f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"


@pytest.fixture(scope="session")
def run_python() -> RunPython:
    """Runs `python ARGS` in the root, in its own process, on `devices` virtual CPU devices."""

    def run(
        *arguments: str, devices: int = 1, timeout: float = 600
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *arguments],
            cwd=ROOT,
            env={**os.environ, "XLA_FLAGS": xla_flags(devices)},
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    return run


@pytest.fixture
def default_signals() -> Iterator[None]:
    """Here and in the processes that the test starts, whatever started the tests had ignored."""
    defaults = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in defaults.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def made_up_gpu() -> Iterator[None]:
    """Kernels for a GPU are interpreted, as if on one with two multiprocessors."""
    if jax.__version_info__ < (0, 11, 2):
        pytest.skip("this jax cannot interpret for GPUs")
    from jax._src.pallas.mosaic_gpu.interpret import params

    device = jax.sharding.AbstractDevice("NVIDIA H200", num_cores=2, platform="gpu")
    mesh = jax.sharding.AbstractMesh((), (), abstract_device=device)
    interpret = params.force_gpu_interpret_mode(params.InterpretGPUParams())
    with jax.sharding.use_abstract_mesh(mesh), interpret:
        yield
