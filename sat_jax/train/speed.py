"""Speed of each rung relative to the dense one, measured so that load on the machine cancels.

After training, the rungs take turns on the same batch. What is reported of a rung is the median
over rounds of dense time ÷ rung time within a round: load that lasts longer than a round slows both
times alike.
"""

import functools
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax

from sat_jax.parallel.processes import on_primary
from sat_jax.sparsity.plan import Plan
from sat_jax.train.programs import RungPrograms
from sat_jax.train.run_state import RunState

SHARE = 0.05  # of a run's wall time, at most
MINIMUM_ROUNDS, MAXIMUM_ROUNDS = 2, 9
_TURN_SECONDS = 0.1  # shorter steps are repeated within a turn up to about this


class Turn(NamedTuple):
    """Seconds of a rung's steps in one round: wall time, and CPU time of this process."""

    wall: float
    cpu: float


class Speedup(NamedTuple):
    """Medians over rounds of dense time ÷ rung time; `speedup_spread` is half the interquartile
    range of the wall-time ratios.

    `cpu_speedup` is None where another device than the CPU computes.
    """

    speedup: float
    speedup_spread: float
    cpu_speedup: float | None


def measure_speed(
    state: RunState,
    programs: Mapping[Plan, RungPrograms],
    dense: Plan,
    inputs: tuple[Any, ...],
    step_seconds: Mapping[Plan, float],
    limit: float,
    change_blocks: Callable[[Plan], None],
) -> dict[Plan, Speedup]:
    """Return the speed-up of each plan that `limit` seconds allow to measure.

    `programs` begins with the first rung. `inputs` are those of `RunState.step`. `step_seconds` are
    estimates. `change_blocks` gives the full state the stored blocks of a plan. The steps change
    `state` (a copy would not fit every device); save it before. All processes call this; process 0
    chooses the number of rounds.
    """
    order = [dense, *(plan for plan in programs if plan != dense)]
    slowest = max(step_seconds.values())
    steps = on_primary(lambda: max(1, math.ceil(_TURN_SECONDS / slowest)))

    def turn(plan: Plan) -> Turn:
        state.expand()
        change_blocks(plan)
        state.choose(programs[plan])
        state.compact(programs[plan])
        state.wait()
        wall, cpu = time.perf_counter(), time.process_time()
        for _ in range(steps):
            state.step(*inputs)
        state.wait()
        return Turn(time.perf_counter() - wall, time.process_time() - cpu)

    costs = [steps * step_seconds[plan] for plan in order]
    rounds = take_turns([functools.partial(turn, plan) for plan in order], costs, limit)
    on_cpu = jax.devices()[0].platform == "cpu"
    return {
        plan: speedup_of(pairs, on_cpu)
        for number, plan in enumerate(order)
        if len(pairs := [(turns[0], turns[number]) for turns in rounds if number < len(turns)])
        >= MINIMUM_ROUNDS
    }


def take_turns(
    turns: Sequence[Callable[[], Turn]], costs: Sequence[float], limit: float
) -> list[list[Turn]]:
    """Return the turns of each round, in the order of `turns`.

    Where `limit` seconds do not allow `MINIMUM_ROUNDS` rounds of all `turns`, a round has the first
    two only; where they do not allow these, there is no round. `costs` are estimates in seconds;
    what each turn took, conversions included, replaces them.
    """
    started, costs = time.perf_counter(), list(costs)
    rounds: list[list[Turn]] = []

    def affordable() -> int:
        left = limit - (time.perf_counter() - started)
        to_do = max(1, MINIMUM_ROUNDS - len(rounds))
        most = len(rounds[-1]) if rounds else len(turns)
        return next((n for n in (most, 2) if to_do * sum(costs[:n]) <= left), 0)

    while len(rounds) < MAXIMUM_ROUNDS and (count := on_primary(affordable)):
        rounds.append([])
        for number in range(count):
            began = time.perf_counter()
            rounds[-1].append(turns[number]())
            costs[number] = time.perf_counter() - began
    return rounds


def speedup_of(pairs: Sequence[tuple[Turn, Turn]], on_cpu: bool) -> Speedup:
    """Return the speed-up of a rung from its (dense, rung) turns of each round."""
    ratios = [dense.wall / rung.wall for dense, rung in pairs]
    cpu = statistics.median(dense.cpu / rung.cpu for dense, rung in pairs) if on_cpu else None
    low, median, high = statistics.quantiles(ratios, method="inclusive")
    return Speedup(median, (high - low) / 2, cpu)
