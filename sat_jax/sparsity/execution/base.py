"""Base class of the executions: it splits layers into segments and omits nothing."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from sat_jax.nn.branch import branches
from sat_jax.nn.context import Selection
from sat_jax.nn.decoder import Decoder
from sat_jax.nn.layout import Layout
from sat_jax.sparsity.correction import Corrections
from sat_jax.sparsity.execution.state import TrainState, Tree, optimizer_step
from sat_jax.sparsity.plan import Passes, Plan
from sat_jax.sparsity.rows import Kept


@dataclasses.dataclass(frozen=True)
class Execution:
    """How the training steps of a plan are computed.

    This base class splits layers into the plan's segments, and computes and updates every unit.

    `compact` and `expand` convert path-keyed trees (parameters, moments, update counts) between
    full arrays and the arrays that a step trains. `trained` returns the arrays with respect to
    which the loss is differentiated; `bind`, traced inside the loss, returns the model with them.
    `passes`: what is omitted of omitted units.
    """

    layout: Layout[Decoder]
    plan: Plan
    passes: Passes = "all"
    selection: ClassVar[Selection | None] = None
    computes_omitted: ClassVar[bool] = False
    """Whether omitted units are computed and then multiplied by 0."""

    def compact(self, tree: Tree, kept: Kept) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the trained part of a full tree, and the omitted part, which is empty here."""
        del kept
        return self.map_segments(lambda _path, _number, part: part, tree), {}

    def expand(self, tree: Tree, omitted: Tree, kept: Kept) -> dict[str, Any]:
        """Return the full tree from its trained and omitted parts: the exact inverse of
        `compact`."""
        del omitted, kept
        return {path: join_segments(value) for path, value in tree.items()}

    def trained(self, params: Tree, kept: Kept) -> dict[str, Any]:
        """Return the arrays with respect to which the loss is differentiated."""
        del kept
        return {path: value for path, value in params.items() if self.layout.leaves[path].trained}

    def bind(
        self, trained: Tree, params: Tree, omitted: Tree, kept: Kept, corrections: Corrections
    ) -> Decoder:
        """Return the model with the `trained` arrays.

        `params` and `omitted` are what `compact` returned for the parameters. `corrections` are
        added to the kept rows of the output weights.
        """
        del omitted, kept, corrections
        return self.layout.bind({**params, **trained})

    def update(
        self,
        optimizer: optax.GradientTransformation,
        grads: dict[str, Any],
        factor: Float[Array, ""],
        state: TrainState,
        kept: Kept,
    ) -> TrainState:
        """Return the state after one optimizer step with the gradients scaled by `factor`."""
        del kept
        return optimizer_step(optimizer, grads, factor, state)

    def map_segments(
        self, function: Callable[[str, int, Any], Any], tree: Tree, *, outside: bool = True
    ) -> dict[str, Any]:
        """Apply `function(path, segment number, part)` to each segment of each array in the layers.

        Returns a tuple of the results for each of these arrays. `outside`: also returns the arrays
        outside the layers, unchanged.
        """
        result: dict[str, Any] = {}
        for path, value in tree.items():
            if self.layout.leaves[path].in_layers:
                parts = value if isinstance(value, tuple) else self._split(value)
                result[path] = tuple(function(path, n, part) for n, part in enumerate(parts))
            elif outside:
                result[path] = value
        return result

    def kept_of(self, path: str, kept: Mapping[str, Array]) -> Array | None:
        """Return the kept indices in one segment of the unit that is an axis of the array.

        None: all rows of the array are kept.
        """
        unit = self.layout.unit_of(path, kept)
        return None if unit is None else kept[unit]

    def omitting_branches(self, kept: Kept) -> list[str]:
        """Return the names of the branches that omit units in some segment."""
        units = {unit for segment in kept for unit in segment}
        return sorted({self.layout.units[unit].branch for unit in units})

    def add_complement(self, model: Decoder, values: Tree, kept: Kept, **masks: Any) -> None:
        """Set `complement` of each branch that omits units, for the forward pass only.

        The complements are branches with `values` by path and `masks`. In a segment where the value
        of its output weight is None, a complement is not computed.
        """
        frozen = {
            path: value if value is None else jax.lax.stop_gradient(value)
            for path, value in values.items()
        }
        others = branches(self.layout.bind(frozen, **masks).layers)
        for name in self.omitting_branches(kept):
            branches(model.layers)[name].complement = others[name]

    def split_layers(self, value: Array) -> Any:
        """Return an array of all layers in the form that arrays of a trained state have."""
        return self._split(value)

    def _split(self, value: Array) -> tuple[Array, ...]:
        segments = self.plan.segments
        if len(segments) == 1:
            return (value,)
        return tuple(value[segment.start : segment.stop] for segment in segments)


def join_segments(value: Any) -> Any:
    """Return the arrays of all segments, concatenated along the layers."""
    if not isinstance(value, tuple):
        return value
    return value[0] if len(value) == 1 else jnp.concatenate(value)
