"""The rungs of a run and the steps at which neurons are selected."""

import dataclasses
import hashlib
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from sat_jax.errors import UserError
from sat_jax.sparsity.block_patterns import Grid, block_counts
from sat_jax.sparsity.plan import (
    Dropped,
    LayerRates,
    Neurons,
    Plan,
    Stored,
    by_layer,
    has_channels,
    make_plan,
)
from sat_jax.sparsity.schedule import stairs

if TYPE_CHECKING:
    from sat_jax.config_sparsity import SparsityConfig, WeightSparsityConfig


@dataclasses.dataclass(frozen=True)
class Rung:
    """Steps `[start, stop)` with the same plan.

    `rate_attention` and `rate_mlp` are the requested omission rates at its first step (means over
    layers), both 0 if the plan omits nothing. The plan has the realised counts.
    """

    start: int
    stop: int
    plan: Plan
    rate_attention: float
    rate_mlp: float

    @property
    def rate(self) -> float:
        """The highest of the two requested rates, the share of dropped backward passes of branches,
        the shares of tokens that weight gradients and layers leave out, and the share of the blocks
        that matrices do not store; logged as `omission_rate`; 0: dense."""
        plan = self.plan
        omitted = max(self.rate_attention, self.rate_mlp, 1 - plan.stored_share)
        return max(omitted, plan.dropped_share, plan.token_rate, plan.token_skip_rate)


class Controller:
    """The rungs of a run, first to last.

    With the schedule `auto` a rung ends at the first evaluation whose loss is not lower than the
    best one in the rung by the relative decrease `min_gain`; other schedules have None.
    `refresh_every` 0: neurons are selected inside each layer from each batch, not between steps.
    `exchange_every`: steps between exchanges of stored blocks; 0: these stay.
    """

    def __init__(
        self,
        rungs: Sequence[Rung],
        neurons: Neurons,
        refresh_every: int,
        min_gain: float | None = None,
        exchange_every: int = 0,
    ):
        self.rungs, self.neurons = tuple(rungs), neurons
        self.refresh_every, self.exchange_every = refresh_every, exchange_every
        self._min_gain, self._best_loss = min_gain, math.inf

    @property
    def sparse(self) -> bool:
        """Whether any rung omits neurons."""
        return not all(self.neurons.keeps_all(rung.plan) for rung in self.rungs)

    def number_at(self, step: int) -> int:
        """Return the number of the rung that contains step `step`; both count from 0."""
        return next(n for n, rung in enumerate(self.rungs) if rung.start <= step < rung.stop)

    def rung_at(self, step: int) -> Rung:
        """Return the rung that contains step `step`, from 0."""
        return self.rungs[self.number_at(step)]

    def refreshes(self, step: int) -> bool:
        """Return whether neurons are selected before step `step`: at the start of a sparse rung and
        every `refresh_every` steps in it."""
        rung = self.rung_at(step)
        if self.refresh_every == 0 or self.neurons.keeps_all(rung.plan):
            return False
        return (step - rung.start) % self.refresh_every == 0

    def exchanges(self, step: int) -> bool:
        """Return whether stored blocks are exchanged before step `step`, inside a rung."""
        rung = self.rung_at(step)
        if self.exchange_every == 0 or not rung.plan.stored or step == rung.start:
            return False
        return (step - rung.start) % self.exchange_every == 0

    def block_gradients(self, number: int) -> int:
        """Return how often the gradients of all blocks are measured while rung `number` is trained:
        at its exchanges, and before the next rung if that stores more blocks."""
        rung, following = self.rungs[number], self.rungs[number + 1 : number + 2]
        grows = bool(rung.plan.stored) and any(after.plan.stored for after in following)
        return grows + sum(map(self.exchanges, range(rung.start, rung.stop)))

    def evaluated(self, step: int, loss: float) -> bool:
        """Record the held-out loss after `step` steps and return whether the next rung now starts
        earlier than scheduled."""
        if self._min_gain is None or step in (0, self.rungs[-1].stop):
            return False
        number = self.number_at(step - 1)
        current = self.rungs[number]
        if current.stop == step:  # losses of other rungs are not compared
            self._best_loss = math.inf
            return False
        if loss < self._best_loss * (1 - self._min_gain):
            self._best_loss = loss
            return False
        if self.neurons.is_dense(current.plan):
            return False
        self._start(number + 1, step)
        self._best_loss = math.inf
        return True

    def to_json(self) -> dict[str, Any]:
        """Return the starts of the rungs and the best loss, for a checkpoint."""
        loss = None if math.isinf(self._best_loss) else self._best_loss
        starts = [rung.start for rung in self.rungs]
        return {"plans": self._plans(), "starts": starts, "best_loss": loss}

    def restore(self, saved: dict[str, Any]) -> None:
        """Restore the result of `to_json`. Raises `UserError` if the plans differ."""
        if saved["plans"] != self._plans():
            raise UserError(
                "the plans of the rungs differ from those in the checkpoint, which is of an older"
                " version; accepted: another work directory"
            )
        for number, start in enumerate(saved["starts"][1:], 1):
            self._start(number, start)
        self._best_loss = math.inf if saved["best_loss"] is None else saved["best_loss"]

    def _plans(self) -> str:
        """Return a hash of the plans of all rungs."""
        return hashlib.sha256(repr([rung.plan for rung in self.rungs]).encode()).hexdigest()[:20]

    def _start(self, number: int, step: int) -> None:
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
    rounds: int = 1,
    grids: Mapping[str, Grid] = {},
) -> Controller:
    """Return the controller of a run at r0 `rates` (attention, MLP). Adjacent stairs with equal
    plans form one rung. `balance` and `rounds` are those of `make_plan`; `grids` of the
    block-sparse matrices, by path."""
    rungs: list[Rung] = []
    for stair in stairs(config.schedule, steps, config.rungs, config.split, config.dense_start):
        attention, mlp = (_scaled(rate, stair.scale) for rate in rates)
        requested = [overall(attention), overall(mlp)]
        plan = make_plan(
            neurons,
            attention,
            mlp,
            attention_unit=config.attention_unit,
            dense_layers=config.dense_layers,
            max_segments=config.max_segments,
            block=config.block,
            balance=balance,
            rounds=rounds,
            token_skip_rate=config.token_skip_rate * stair.scale,
        )
        if overall(config.branch_rate) * stair.scale > 0:
            dropped = _dropped(config, neurons, stair.scale)
            plan = dataclasses.replace(plan, dropped=dropped)
        plan = dataclasses.replace(plan, token_rate=config.token_rate * stair.scale)
        if grids and stair.scale > 0:
            before = next((r.plan.stored for r in reversed(rungs) if r.plan.stored), ())
            stored = _stored(config.weights, grids, stair.scale, before)
            plan = dataclasses.replace(plan, stored=stored)
        if rungs and rungs[-1].plan == plan:
            rungs[-1] = dataclasses.replace(rungs[-1], stop=stair.stop)
        else:
            if neurons.is_dense(plan):
                requested = [0.0, 0.0]
            rungs.append(Rung(stair.start, stair.stop, plan, *requested))
    min_gain = config.min_gain if config.schedule == "auto" else None
    exchange_every = 0 if config.weights.update == "none" else config.weights.update_every
    return Controller(rungs, neurons, config.refresh_every, min_gain, exchange_every)


def _stored(
    config: "WeightSparsityConfig", grids: Mapping[str, Grid], scale: float, before: Stored
) -> Stored:
    """Return the stored blocks where the omitted share is `scale` times that of the settings; none
    where all would be stored. `before`: those of the rung to which blocks are added."""
    density = 1 - (1 - config.density) * scale
    options = {"grown": bool(before), "exchanged": config.update == "rigl"}
    counts = block_counts(config.pattern, grids, config.block, density, **options)
    if all(count.per_row == count.grid[1] for count in counts.values()):
        return ()
    same = before and all(known.per_row == counts[path].per_row for path, known in before)
    return before if same else tuple(counts.items())


def _dropped(config: "SparsityConfig", neurons: Neurons, scale: float) -> Dropped:
    """Return the probabilities of each layer by branch, where they are `scale` times r0."""
    rates = tuple(rate * scale for rate in by_layer(config.branch_rate, neurons))
    wanted = {"all": (False, True), "attention": (False,), "mlp": (True,)}[config.branches]
    branches = neurons.branches.items()
    return tuple((name, rates) for name, units in branches if has_channels(units) in wanted)


def overall(rates: LayerRates) -> float:
    """Return the mean rate over layers."""
    return statistics.fmean(rates) if isinstance(rates, Sequence) else rates


def _scaled(rates: LayerRates, scale: float) -> LayerRates:
    if isinstance(rates, Sequence):
        return [rate * scale for rate in rates]
    return rates * scale
