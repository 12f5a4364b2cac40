"""Plain Python between steps: which rung a step belongs to, and when neurons are chosen anew."""

import dataclasses
import hashlib
import math
import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from sat_jax.errors import UserError
from sat_jax.sparsity.plan import LayerRates, Neurons, Plan, make_plan
from sat_jax.sparsity.schedule import stairs

if TYPE_CHECKING:
    from sat_jax.config import SparsityConfig


@dataclasses.dataclass(frozen=True)
class Rung:
    """Steps `[start, stop)` that share one plan.

    `rate_attention` and `rate_mlp` are the omission rates that the first of the stairs in it asked
    for (means over layers where each has its own), both 0 where the plan omits nothing; the plan
    has the realised counts.
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


class Controller:
    """The rungs of a run, first to last.

    With the schedule `auto` a rung ends early: as soon as `patience` evaluations one after the
    other have not brought the held-out loss down by the share `min_gain` (see `evaluated`).
    `refresh_every` 0: no neurons are chosen between steps, but in each layer, from each batch.
    """

    def __init__(
        self,
        rungs: Sequence[Rung],
        neurons: Neurons,
        refresh_every: int,
        patience: int | None = None,
        min_gain: float = 0.0,
    ):
        self.rungs, self.neurons = tuple(rungs), neurons
        self.refresh_every = refresh_every
        self._patience, self._min_gain = patience, min_gain
        self._best, self._waited = math.inf, 0

    @property
    def sparse(self) -> bool:
        """Whether any rung omits anything."""
        return not all(self.neurons.is_dense(rung.plan) for rung in self.rungs)

    def number_at(self, step: int) -> int:
        """Which rung, from 0, trains step `step` (from 0)."""
        return next(n for n, rung in enumerate(self.rungs) if rung.start <= step < rung.stop)

    def rung_at(self, step: int) -> Rung:
        """The rung that trains step `step` (from 0)."""
        return self.rungs[self.number_at(step)]

    def refreshes(self, step: int) -> bool:
        """Whether neurons are chosen before step `step`: at the start of a sparse rung and every
        `refresh_every` steps in it."""
        rung = self.rung_at(step)
        if self.refresh_every == 0 or self.neurons.is_dense(rung.plan):
            return False
        return (step - rung.start) % self.refresh_every == 0

    def evaluated(self, step: int, loss: float) -> bool:
        """Takes note of the held-out loss after `step` steps; whether the next rung begins now,
        earlier than it would have to."""
        if self._patience is None or step in (0, self.rungs[-1].stop):
            return False
        if loss < self._best * (1 - self._min_gain):
            self._best, self._waited = loss, 0
            return False
        self._waited += 1
        number = self.number_at(step - 1)
        ending, dense = self.rungs[number], self.neurons.is_dense(self.rungs[number].plan)
        if self._waited < self._patience or dense or ending.stop == step:
            return False
        self._begin(number + 1, step)
        self._best, self._waited = math.inf, 0
        return True

    def to_json(self) -> dict[str, Any]:
        """What `evaluated` has learnt and decided, for a checkpoint."""
        best = None if math.isinf(self._best) else self._best
        starts = [rung.start for rung in self.rungs]
        return {"plans": self._plans(), "starts": starts, "best": best, "waited": self._waited}

    def restore(self, known: dict[str, Any]) -> None:
        """The inverse of `to_json`. Raises `UserError` where the plans are others."""
        if known["plans"] != self._plans():
            raise UserError(
                "the rungs are not those that this run was started with: the run is of an older"
                " version; accepted: another work directory"
            )
        for number, start in enumerate(known["starts"]):
            if number:
                self._begin(number, start)
        self._best = math.inf if known["best"] is None else known["best"]
        self._waited = known["waited"]

    def _plans(self) -> str:
        """A name for what all rungs keep."""
        return hashlib.sha256(repr([rung.plan for rung in self.rungs]).encode()).hexdigest()[:20]

    def _begin(self, number: int, step: int) -> None:
        rungs = list(self.rungs)
        rungs[number - 1] = dataclasses.replace(rungs[number - 1], stop=step)
        rungs[number] = dataclasses.replace(rungs[number], start=step)
        self.rungs = tuple(rungs)


def make_controller(
    config: "SparsityConfig",
    neurons: Neurons,
    steps: int,
    rates: tuple[LayerRates, LayerRates],
    balance: int,
) -> Controller:
    """The rungs of a run at r0 `rates` (attention, MLP); rungs with equal counts are one."""
    rungs: list[Rung] = []
    for stair in stairs(config.schedule, steps, config.rungs, config.split, config.dense_start):
        attention, mlp = (_scaled(rate, stair.scale) for rate in rates)
        asked = [overall(attention), overall(mlp)]
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
        if rungs and rungs[-1].plan == plan:
            rungs[-1] = dataclasses.replace(rungs[-1], stop=stair.stop)
        else:
            if neurons.is_dense(plan):
                asked = [0.0, 0.0]
            rungs.append(Rung(stair.start, stair.stop, plan, *asked))
    patience = config.patience if config.schedule == "auto" else None
    return Controller(rungs, neurons, config.refresh_every, patience, config.min_gain)


def overall(rates: LayerRates) -> float:
    """One rate for all layers: the mean of those that each has."""
    return statistics.fmean(rates) if isinstance(rates, Sequence) else rates


def _scaled(rates: LayerRates, scale: float) -> LayerRates:
    if isinstance(rates, Sequence):
        return [rate * scale for rate in rates]
    return rates * scale
