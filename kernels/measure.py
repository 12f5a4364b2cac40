"""Timing of calls, and the options that the benchmark and tuning share."""

import argparse
import contextlib
import faulthandler
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from kernels.block_sparse_matmul.workloads import MODELS
from kernels.program import Program

# Shorter calls are queued several times per timing, so that launching them is not measured.
_SHORT_CALL = 5e-3
_MAX_QUEUED = 16

# Stored in a file while a measurement runs. It remains there if the measurement ends the process.
UNFINISHED = {"error": "started, not finished"}
_TIME_LIMIT = 120.0  # seconds of one measurement, compilation included
_STDERR = 2


@contextlib.contextmanager
def time_limit(limit: float = _TIME_LIMIT) -> Iterator[None]:
    """End the process if the body takes longer than `limit` seconds.

    A Python exception cannot interrupt a kernel that never returns.
    """
    faulthandler.dump_traceback_later(limit, exit=True, file=_STDERR)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


def seconds(program: Program, repeat: int) -> float:
    """Return the seconds of one call on random data: the median of `repeat` timings.

    Raises the exceptions of the compiler.
    """
    return median_seconds(_call(program), jax.block_until_ready, repeat)


def trace(program: Program, repeat: int, folder: Path) -> None:
    """Write a profile of `repeat` calls, apart from the timings, which profiling would slow."""
    call = _call(program)
    jax.block_until_ready(call())
    with jax.profiler.trace(folder):
        _timed(call, jax.block_until_ready, repeat)


def _call(program: Program) -> Callable[[], Any]:
    jitted, arguments = jax.jit(program.function), _random(program)
    return lambda: jitted(*arguments)


def median_seconds(call: Callable[[], Any], wait: Callable[[Any], object], repeat: int) -> float:
    """Return the median seconds of `call`, where `wait` blocks until its result is ready.

    The first two calls are not counted.
    """
    wait(call())
    calls = max(1, min(_MAX_QUEUED, int(_SHORT_CALL / _timed(call, wait, 1))))
    return statistics.median(_timed(call, wait, calls) for _ in range(repeat))


def first_line(error: Exception) -> str:
    """Return the type and the first line of an exception, at most 200 characters."""
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


def parser(
    command: str,
    description: str | None,
    *,
    models: list[str],
    densities: list[float],
    blocks: list[int],
    tokens: list[int],
) -> argparse.ArgumentParser:
    """Return a parser with the options that the benchmark and tuning share, and their defaults."""
    result = argparse.ArgumentParser(
        command, description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )

    def add_list(name: str, values: list[Any], text: str, **options: Any) -> None:
        text += f" (default: {', '.join(map(str, values))})"
        result.add_argument(name, nargs="+", default=values, help=text, **options)

    add_list("--model", models, "sizes of the MLP", choices=MODELS)
    add_list("--density", densities, "kept fractions, 0.125 to 1", type=_density)
    add_list("--block", blocks, "block sizes", type=int, choices=(64, 128, 256))
    add_list("--tokens", tokens, "numbers of tokens", type=count)
    result.add_argument("--repeat", type=count, default=20, help="timings of each (default: 20)")
    result.add_argument("--minutes", type=float, help="start no measurement after this time")
    return result


def count(text: str) -> int:
    """Return a positive number of the command line."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text}, accepted 1 and more")
    return number


def _density(text: str) -> float:
    number = float(text)
    if not 0.125 <= number <= 1:
        raise argparse.ArgumentTypeError(f"{text}, accepted 0.125 to 1")
    return number


def _timed(call: Callable[[], Any], wait: Callable[[Any], object], calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        result = call()
    wait(result)
    return (time.perf_counter() - start) / calls


def _random(program: Program) -> list[jax.Array]:
    """Return values of N(0, 1), and block ids spread evenly over the matrix before them."""
    arrays: list[jax.Array] = []
    for seed, shape in enumerate(program.arguments):
        if jnp.issubdtype(shape.dtype, jnp.integer):
            assert program.block
            blocks = arrays[-1].shape[0] // program.block
            arrays.append(jnp.arange(shape.size, dtype=jnp.int32) * blocks // shape.size)
        else:
            arrays.append(jax.random.normal(jax.random.key(seed), shape.shape, shape.dtype))
    return arrays
