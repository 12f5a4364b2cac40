"""SparseLoRA (Khaki et al., arXiv:2506.16500): frozen weights omit units that each layer chooses
from the batch, and adapters have all units.

An omitted unit has zeros in place of the products with its frozen rows, forward and backward; the
products with its adapters stay, and are added as always. Vectors, such as biases, stay too. Tokens
that bear loss may be computed with all units.
"""

import dataclasses
import math
from functools import cached_property
from typing import Any

import jax
import optax
from flax import nnx
from jaxtyping import Array, Bool, Float

from sat_jax.nn.branch import Branch
from sat_jax.nn.layout import Unit, branch_values
from sat_jax.nn.omitted_rows import DenseTokens, MaskedRows, OmittedRows, dense_tokens
from sat_jax.nn.param import Control
from sat_jax.nn.partly_trained import join_rows
from sat_jax.sparsity.execution.dynamic import Dynamic, LayerSelection
from sat_jax.sparsity.execution.state import TrainState, optimizer_step
from sat_jax.sparsity.rows import Kept, gather_complement, gather_rows, indicator


@dataclasses.dataclass(frozen=True)
class BaseSelection(LayerSelection):
    """How a branch of one layer chooses the units of its frozen weights. `share` of the tokens of a
    row may be `tokens` that are computed with all units."""

    share: float = 0.0
    tokens: DenseTokens | None = None

    def for_tokens(self, loss_mask: Bool[Array, "B T"]) -> "BaseSelection":
        """Return the choice for a batch, whose tokens that bear loss are computed with all units,
        if `share` is above 0."""
        if self.share == 0:
            return self
        tokens = dense_tokens(loss_mask, dense_count(self.share, loss_mask.shape[1]))
        return dataclasses.replace(self, tokens=tokens)

    def _selected(self, branch: Branch, unit: Unit, kept: Array) -> Branch:
        """Return the branch with its frozen weights omitted; if they are gathered, with the kept
        units in front: a branch is a sum over units."""

        def select(path: str, array: Array) -> Any:
            leaf = self.layout.leaves[path]
            if unit.name not in leaf.axes:
                return array
            is_frozen = leaf.role in ("read", "write") and not leaf.trained
            if self.masked:
                mask = indicator(kept, unit.size)
                tokens = None if self.tokens is None else self.tokens.mask
                return MaskedRows(array, mask, tokens) if is_frozen else array
            balance, axis = self.plan.balance, leaf.axis(unit.name) - len(leaf.axes)
            rows, others = (
                gather(array[None], kept[None], balance)[0]
                for gather in (gather_rows, gather_complement)
            )
            parts = balance if kept.ndim == 1 else 1
            if is_frozen:
                return OmittedRows(rows, others, self.tokens, axis, parts)
            return join_rows(rows, others, axis, parts)

        graph, masks, state = nnx.split(branch, Control, ...)  # type: ignore[misc]
        arrays = [select(*item) for item in branch_values(branch, unit.branch).items()]
        selected: Branch = nnx.merge(
            graph, masks, jax.tree.unflatten(jax.tree.structure(state), arrays)
        )
        return selected


def dense_count(share: float, length: int) -> int:
    """Return how many tokens of a row of `length` may be computed with all units."""
    return math.ceil(round(share * length, 9))


@dataclasses.dataclass(frozen=True)
class SparseBase(Dynamic):
    """Adapters of all units are trained; `dense_share` is that of `BaseSelection`."""

    dense_share: float = 0.0

    @cached_property
    def selection(self) -> BaseSelection:  # type: ignore[override]
        """What chooses the units inside a layer."""
        chosen = (self.layout, self.plan, self.criteria, self.masked)
        return BaseSelection(*chosen, self.dense_share)

    def update(
        self,
        optimizer: optax.GradientTransformation,
        grads: dict[str, Any],
        factor: Float[Array, ""],
        state: TrainState,
        kept: Kept,
    ) -> TrainState:
        """Return the state after one step, in which all adapters are updated."""
        del kept
        return optimizer_step(optimizer, grads, factor, state)
