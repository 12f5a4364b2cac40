"""Selection inside each layer, from the very batch that it is about to process.

Weights stay full. The kept units are those that `choose_units` keeps for statistics of this batch's
normed inputs; then their rows are gathered, or the other units' activations are multiplied by 0.
No gradient flows through the choice; that of gathered rows is scattered into full arrays.
"""

import dataclasses
from collections.abc import Collection
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from sat_jax.nn.branch import Branch
from sat_jax.nn.context import Context
from sat_jax.nn.decoder import Decoder
from sat_jax.nn.layout import Layout, Unit, branch_values
from sat_jax.nn.observe import input_sums, output_energy
from sat_jax.nn.param import Control
from sat_jax.nn.stack import SELECTED
from sat_jax.sparsity.choose import Criteria, branch_keys, choose_units
from sat_jax.sparsity.execution.base import Execution
from sat_jax.sparsity.execution.mask import where_kept
from sat_jax.sparsity.execution.state import TrainState, map_trees, optimizer_step
from sat_jax.sparsity.importance import METRICS
from sat_jax.sparsity.plan import Plan, Segment, neurons_of
from sat_jax.sparsity.rows import Kept, gather_rows, indicator
from sat_jax.sparsity.statistics import Observable, Statistics

Needs = Collection[Observable]


@dataclasses.dataclass(frozen=True)
class LayerSelection:
    """How a branch of one layer chooses its units. `masked`: by masks; otherwise rows are
    gathered."""

    layout: Layout[Decoder]
    plan: Plan
    criteria: Criteria
    masked: bool

    def for_tokens(self, loss_mask: Bool[Array, "B T"]) -> "LayerSelection":
        """Return the choice of units for a batch whose tokens bear loss as `loss_mask` says."""
        del loss_mask
        return self

    def __call__(
        self, branch: Branch, x: Float[Array, "B T D"], context: Context
    ) -> tuple[Branch, dict[str, Array]]:
        """Return the branch with the kept units alone, and their indices by unit."""
        segment = self.plan.segments[context.segment]
        for unit in neurons_of(self.layout).omitted(segment):
            if unit.name in branch.units:
                kept = self._choose(branch, unit, segment, x, context)
                # Saved for the backward pass, which must not choose again.
                kept = checkpoint_name(kept, SELECTED)
                return self._selected(branch, unit, kept), {unit.name: kept}
        return branch, {}

    def _choose(
        self, branch: Branch, unit: Unit, segment: Segment, x: Array, context: Context
    ) -> Int[Array, "*within kept"]:
        """Return the kept indices, as of a model of one layer."""
        if context.key is None:
            raise ValueError("a dynamic selection needs a key")
        graph, state = nnx.split(branch)
        branch = nnx.merge(graph, jax.lax.stop_gradient(state))
        x, needs = jax.lax.stop_gradient(x), METRICS[self.criteria.metric].needs
        stats = observe_branch(branch, x, context.weight_BT, needs)
        params = {
            path: value[None].astype(jnp.float32)
            for path, value in branch_values(branch, unit.branch).items()
        }
        one_layer = dataclasses.replace(segment, start=0, stop=1)
        key = branch_keys(self.layout, context.key)[unit.branch]
        rest = (stats, self.plan, one_layer, unit, self.criteria, key)
        return choose_units(self.layout, params, *rest)[0][0]

    def _selected(self, branch: Branch, unit: Unit, kept: Array) -> Branch:
        if self.masked:
            copy: Branch = nnx.merge(*nnx.split(branch))
            copy.masks[unit.name].set_value(indicator(kept, unit.size).astype(jnp.float32))
            return copy

        def gather(path: str, array: Array) -> Array:
            if unit.name not in self.layout.leaves[path].axes:
                return array
            return gather_rows(array[None], kept[None], self.plan.balance)[0]

        graph, masks, state = nnx.split(branch, Control, ...)  # type: ignore[misc]
        arrays = [gather(*item) for item in branch_values(branch, unit.branch).items()]
        gathered = jax.tree.unflatten(jax.tree.structure(state), arrays)
        selected: Branch = nnx.merge(graph, masks, gathered)
        return selected


def observe_branch(
    branch: Branch, x: Float[Array, "B T D"], weight_BT: Float[Array, "B T"], needs: Needs
) -> Statistics:
    """Return the statistics of a branch of one layer, before its units are computed."""
    innermost, stats = branch.units[-1], Statistics(jnp.sum(weight_BT))
    if "inputs" in needs:
        sums = jax.tree.map(lambda s: s[None], input_sums(x, weight_BT))
        stats = stats._replace(inputs={innermost: sums})
    if "predicted" in needs:
        a = branch.predicted_activations(x)
        energy = output_energy(a, branch.output_weight, weight_BT, len(branch.units))
        stats = stats._replace(outputs={innermost: energy[None]})
    if "norms" in needs:
        squares = {n: s[None] for n, s in branch.predicted_squares(x, weight_BT).items()}
        stats = stats._replace(norms={innermost: squares})
    return stats


@dataclasses.dataclass(frozen=True)
class Dynamic(Execution):
    """Full weights, split into segments; each layer chooses its units from the batch."""

    criteria: Criteria = Criteria()
    masked: bool = False
    freeze: bool = True

    @property
    def computes_omitted(self) -> bool:  # type: ignore[override]
        """Whether omitted units are computed all the same."""
        return self.masked

    @cached_property
    def selection(self) -> LayerSelection:  # type: ignore[override]
        """What chooses the units inside a layer."""
        return LayerSelection(self.layout, self.plan, self.criteria, self.masked)

    def update(
        self,
        optimizer: optax.GradientTransformation,
        grads: dict[str, Any],
        factor: Float[Array, ""],
        state: TrainState,
        kept: Kept,
    ) -> TrainState:
        """Return the state after one step; `kept` is what the layers chose in it."""
        updated = optimizer_step(optimizer, grads, factor, state)
        if not self.freeze:
            return updated

        def keep(new: dict[str, Any], old: dict[str, Any]) -> dict[str, Any]:
            def keep_rows(path: str, number: int, rows: Array) -> Array:
                unit = self.layout.unit_of(path, kept[number])
                if unit is None:
                    return rows
                mask = indicator(kept[number][unit], self.layout.units[unit].size)
                return where_kept(mask, rows, old[path][number])

            return self.map_segments(keep_rows, new)

        return map_trees(keep, updated, state)
