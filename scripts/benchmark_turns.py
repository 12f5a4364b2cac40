"""Times of variants that are called in turn, and the compiled training step, for `benchmark`."""

import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax

from sat_jax.config import OptimizerConfig
from sat_jax.sparsity.execution.base import Execution
from sat_jax.train.step_program import Program, random_arguments, step_program


class Cost(NamedTuple):
    """Seconds of one call: wall clock, and CPU time of the process."""

    wall: float
    cpu: float


Variant = Callable[[], Cost]


class CompiledStep(NamedTuple):
    """One optimizer step, compiled for shapes: `memory` is known before anything is allocated."""

    execution: Execution
    program: Program
    compiled: Any

    @property
    def memory(self) -> Any:
        """XLA's memory analysis."""
        return self.compiled.memory_analysis()

    def variant(self) -> Variant:
        """Return the step on random arrays."""
        state, kept, batch = random_arguments(self.program, self.execution)

        def step() -> Any:
            nonlocal state
            state, loss = self.compiled(state, kept, batch)
            return state, loss

        return timed(step)


def compile_step(execution: Execution, shape: tuple[int, int]) -> CompiledStep:
    """Return one optimizer step on a batch of `shape` (rows, tokens in each)."""
    program = step_program(execution, OptimizerConfig(), shape)
    lowered = jax.jit(program.function, donate_argnums=0).lower(*program[1:])
    return CompiledStep(execution, program, lowered.compile())


def timed(work: Callable[[], Any]) -> Variant:
    """Return a function that calls `work`, waits for its arrays, and returns the cost."""

    def call() -> Cost:
        wall, cpu = time.perf_counter(), time.process_time()
        jax.block_until_ready(work())
        return Cost(time.perf_counter() - wall, time.process_time() - cpu)

    return call


def take_turns(variants: Mapping[Any, Variant], turns: int) -> dict[Any, list[Cost]]:
    """Return the costs of calling each variant in turn, after one turn that is not counted."""
    costs: dict[Any, list[Cost]] = {name: [] for name in variants}
    for turn in range(turns + 1):
        for name, variant in variants.items():
            cost = variant()
            if turn:
                costs[name].append(cost)
        print(f"turn {turn}/{turns}", file=sys.stderr, flush=True)
    return costs


def ratio(numerators: Sequence[Cost], denominators: Sequence[Cost], field: str) -> float:
    """Return the median over the turns of one variant's seconds divided by the other's."""
    pairs = zip(numerators, denominators, strict=True)
    return statistics.median(getattr(a, field) / getattr(b, field) for a, b in pairs)


def medians(costs: Sequence[Cost]) -> dict[str, float]:
    """Return the median seconds of all calls, by wall clock and by CPU time."""
    return {
        "wall_seconds": statistics.median(cost.wall for cost in costs),
        "cpu_seconds": statistics.median(cost.cpu for cost in costs),
    }
