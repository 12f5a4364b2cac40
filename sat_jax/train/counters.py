"""Counters of a run: tokens by rung, probes, and how often each unit was kept.

Tokens are those that are no padding: speed and FLOPs are theirs. Of examples, only `loss_tokens` of
them bear loss; of text, all do.
"""

import statistics
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jaxtyping import Int

from sat_jax.sparsity.controller import Controller, Rung
from sat_jax.sparsity.plan import Plan, kept_shares
from sat_jax.sparsity.rows import Kept
from sat_jax.train.costs import step_flops
from sat_jax.train.step import StepMetrics

if TYPE_CHECKING:
    from sat_jax.train.setup import Task


class RunCounters:
    """Counts that checkpoints keep, and the record of each step.

    `kept` has by branch how often each innermost unit was kept, `times` `[L, *units]`, and of how
    many selections, `of` `[L]`: of those only that omitted some of the layer's units.
    """

    def __init__(self, controller: Controller):
        neurons = controller.neurons
        layers = neurons.layers
        self.kept: dict[str, dict[str, Int[np.ndarray, ...]]] = {
            name: {
                "times": np.zeros((layers, *(unit.size for unit in units)), np.int32),
                "of": np.zeros(layers, np.int32),
            }
            for name, units in neurons.branches.items()
        }
        self.rung_selections = [0] * len(controller.rungs)
        self.probes = 0
        # Of every start; most of it in the background.
        self.compile_seconds = 0.0
        self.rung_tokens = [0] * len(controller.rungs)
        # Wall time of each step of this start; no part of a checkpoint.
        self._step_seconds: dict[Plan, list[float]] = {}
        self.loss_tokens = 0
        # Wall time until the first step was done, of the start that did it.
        self.first_step_seconds: float | None = None
        self._controller = controller

    @property
    def tokens(self) -> int:
        """Tokens trained on, those without loss among them."""
        return sum(self.rung_tokens)

    @property
    def selections(self) -> int:
        """How often units were chosen."""
        return sum(self.rung_selections)

    @property
    def step_seconds(self) -> dict[Plan, float]:
        """Median wall time of a step of each plan that this start trained, in order."""
        return {plan: statistics.median(steps) for plan, steps in self._step_seconds.items()}

    def to_json(self) -> dict[str, Any]:
        """Return all that checkpoints keep but `kept`."""
        return {
            "rung_selections": self.rung_selections,
            "probes": self.probes,
            "rung_tokens": self.rung_tokens,
            "loss_tokens": self.loss_tokens,
            "first_step_seconds": self.first_step_seconds,
            "compile_seconds": self.compile_seconds,
        }

    def restore(self, kept: dict[str, Any], values: dict[str, Any]) -> None:
        """Set `kept`, and what `to_json` returned."""
        self.kept = jax.tree.map(np.array, kept)
        self.rung_selections, self.probes = list(values["rung_selections"]), values["probes"]
        self.rung_tokens = list(values["rung_tokens"])
        self.loss_tokens = values["loss_tokens"]
        self.first_step_seconds = values["first_step_seconds"]
        self.compile_seconds = values["compile_seconds"]

    def count_selection(self, rung: Rung, kept: Kept, probed: bool) -> None:
        """Count one selection between steps."""
        self.rung_selections[self._controller.rungs.index(rung)] += 1
        self.probes += probed
        self._count_kept(rung.plan, kept)

    def count_step(
        self, rung: Rung, metrics: StepMetrics, seconds: float, task: "Task", steady: bool
    ) -> dict[str, Any]:
        """Count a step's tokens and what its layers chose; return its record for
        `metrics.jsonl`."""
        number = self._controller.rungs.index(rung)
        if any(metrics.kept):
            self.rung_selections[number] += 1
            self._count_kept(rung.plan, metrics.kept)
        tokens = int(metrics.tokens)
        self.rung_tokens[number] += tokens
        self._step_seconds.setdefault(rung.plan, []).append(seconds)
        self.loss_tokens += int(metrics.loss_tokens)
        heads, channels = kept_shares(rung.plan, self._controller.neurons)
        flops = step_flops(task.config, task.model, rung, task.teacher_model)
        return {
            "loss": metrics.loss,
            **metrics.parts,
            "tokens": self.tokens,
            "loss_tokens": self.loss_tokens,
            "learning_rate": metrics.learning_rate,
            "grad_norm": metrics.grad_norm,
            "omission_rate": rung.rate,
            "kept_heads": heads,
            "kept_channels": channels,
            "stored_blocks": rung.plan.stored_share,
            "dropped_branches": rung.plan.dropped_share,
            "omitted_tokens": rung.plan.token_rate,
            "skipped_tokens": rung.plan.token_skip_rate,
            "rung": number,
            "probes": self.probes,
            "seconds": seconds,
            "steady": steady,
            "tokens_per_second": tokens / seconds,
            "flops_per_second": flops * tokens / seconds,
        }

    def _count_kept(self, plan: Plan, kept: Kept) -> None:
        branches = {unit.name: unit.branch for unit in self._controller.neurons.units}
        for segment, units in zip(plan.segments, jax.device_get(kept), strict=True):
            layers = slice(segment.start, segment.stop)
            for unit, indices in units.items():
                counts = self.kept[branches[unit]]
                counts["of"][layers] += 1
                _add_one(counts["times"][layers], indices)


def _add_one(times: Int[np.ndarray, "..."], kept: Int[np.ndarray, "L *within kept"]) -> None:
    """Add one for each kept unit, and for all units inside it."""
    places = np.ogrid[tuple(slice(size) for size in kept.shape)][:-1]
    times[*places, kept] += 1
