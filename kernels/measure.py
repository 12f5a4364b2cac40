"""How calls are timed: shared by the benchmark and by the choice of tiles."""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from kernels.block_sparse_matmul.arg_specs import Program

# A call shorter than that is queued several times at once, so that the device is what is timed.
_LONG = 5e-3
_MOST_QUEUED = 16


def seconds(program: Program, repeat: int, profile: Path | None = None) -> float:
    """Of a call on random data: the median of `repeat` timings. Raises what the compiler does.

    Into the folder `profile` as many more calls are traced, since the profiler slows them.
    """
    jitted, arguments = jax.jit(program.function), _random(program)

    def call() -> Any:
        return jitted(*arguments)

    taken = median_seconds(call, jax.block_until_ready, repeat)
    if profile:
        with jax.profiler.trace(profile):
            _timed(call, jax.block_until_ready, repeat)
    return taken


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
