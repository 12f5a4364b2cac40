"""How calls are timed: shared by the benchmark and by the choice of tiles."""

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

from kernels.block_sparse_matmul.arg_specs import Program

# A call shorter than that is queued several times at once, so that the device is what is timed.
_LONG = 5e-3
_MOST_QUEUED = 16


# What stands in a file while something is measured, and for good where that ends the process.
UNFINISHED = {"error": "begun, and has not ended"}
_LIMIT = 120.0  # seconds that one measurement may take, compiling included
_STDERR = 2


@contextlib.contextmanager
def watched(limit: float = _LIMIT) -> Iterator[None]:
    """Ends the process if the body takes longer. A kernel that waits for ever holds it where
    nothing else would end it."""
    faulthandler.dump_traceback_later(limit, exit=True, file=_STDERR)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


def seconds(program: Program, repeat: int) -> float:
    """Of a call on random data: the median of `repeat` timings. Raises what the compiler does."""
    return median_seconds(_call(program), jax.block_until_ready, repeat)


def trace(program: Program, repeat: int, folder: Path) -> None:
    """As many calls for the profiler, which slows them."""
    call = _call(program)
    jax.block_until_ready(call())
    with jax.profiler.trace(folder):
        _timed(call, jax.block_until_ready, repeat)


def _call(program: Program) -> Callable[[], Any]:
    jitted, arguments = jax.jit(program.function), _random(program)
    return lambda: jitted(*arguments)


def median_seconds(call: Callable[[], Any], wait: Callable[[Any], object], repeat: int) -> float:
    """The same of anything that `wait` sees the end of. The first two calls are not counted."""
    wait(call())
    calls = max(1, min(_MOST_QUEUED, int(_LONG / _timed(call, wait, 1))))
    return statistics.median(_timed(call, wait, calls) for _ in range(repeat))


def first_line(error: Exception) -> str:
    """What a row says of a failure."""
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


def count(text: str) -> int:
    """An argument that is a whole number, one at the least."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text}, accepted 1 and more")
    return number


def _timed(call: Callable[[], Any], wait: Callable[[Any], object], calls: int) -> float:
    started = time.perf_counter()
    for _ in range(calls):
        result = call()
    wait(result)
    return (time.perf_counter() - started) / calls


def _random(program: Program) -> list[jax.Array]:
    """Values of N(0, 1), and ids spread evenly over the blocks of the matrix before them."""
    arrays: list[jax.Array] = []
    for number, shape in enumerate(program.arguments):
        if jnp.issubdtype(shape.dtype, jnp.integer):
            blocks = arrays[-1].shape[0] // program.block
            arrays.append(jnp.arange(shape.size, dtype=jnp.int32) * blocks // shape.size)
        else:
            arrays.append(jax.random.normal(jax.random.key(number), shape.shape, shape.dtype))
    return arrays
