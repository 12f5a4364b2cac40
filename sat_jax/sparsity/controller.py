"""Plain Python between steps: which rung a step belongs to, and when neurons are chosen anew."""

import dataclasses
from typing import TYPE_CHECKING

from sat_jax.sparsity.plan import Neurons, Plan, make_plan
from sat_jax.sparsity.schedule import stairs

if TYPE_CHECKING:
    from sat_jax.config import SparsityConfig


@dataclasses.dataclass(frozen=True)
class Rung:
    """Steps `[start, stop)` that share one plan.

    `rate_attention` and `rate_mlp` are the omission rates that the first of the stairs in it asked
    for, both 0 where the plan omits nothing; the plan has the realised counts.
    """

    start: int
    stop: int
    plan: Plan
    rate_attention: float
    rate_mlp: float

    @property
    def rate(self) -> float:
        """The higher of the two asked rates, logged as `omission_rate`: 0 means dense."""
        return max(self.rate_attention, self.rate_mlp)


@dataclasses.dataclass(frozen=True)
class Controller:
    """The rungs of a run, first to last."""

    rungs: tuple[Rung, ...]
    neurons: Neurons
    refresh_every: int

    @property
    def sparse(self) -> bool:
        """Whether any rung omits anything."""
        return not all(self.neurons.is_dense(rung.plan) for rung in self.rungs)

    def rung_at(self, step: int) -> Rung:
        """The rung that trains step `step` (from 0)."""
        return next(rung for rung in self.rungs if rung.start <= step < rung.stop)

    def refreshes(self, step: int) -> bool:
        """Whether neurons are chosen before step `step`: at the start of a sparse rung and every
        `refresh_every` steps in it."""
        rung = self.rung_at(step)
        if self.neurons.is_dense(rung.plan):
            return False
        return (step - rung.start) % self.refresh_every == 0


def make_controller(
    config: "SparsityConfig", neurons: Neurons, steps: int, rates: tuple[float, float], balance: int
) -> Controller:
    """The rungs of a run at r0 `rates` (attention, MLP); rungs with equal counts are one."""
    rungs: list[Rung] = []
    for stair in stairs(config.schedule, steps, config.rungs, config.split):
        attention, mlp = rates[0] * stair.scale, rates[1] * stair.scale
        plan = make_plan(
            neurons,
            attention,
            mlp,
            attention_unit=config.attention_unit,
            dense_layers=config.dense_layers,
            max_segments=config.max_segments,
            block=config.block,
            balance=balance,
        )
        if neurons.is_dense(plan):
            attention = mlp = 0.0
        if rungs and rungs[-1].plan == plan:
            rungs[-1] = dataclasses.replace(rungs[-1], stop=stair.stop)
        else:
            rungs.append(Rung(stair.start, stair.stop, plan, attention, mlp))
    return Controller(tuple(rungs), neurons, config.refresh_every)
