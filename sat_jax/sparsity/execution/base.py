"""What the executions share: segments of layers, and the verbs with their plain meaning."""

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
from sat_jax.sparsity.plan import Plan
from sat_jax.sparsity.rows import Kept


@dataclasses.dataclass(frozen=True)
class Execution:
    """How a plan is trained. As it stands: layers are split into the plan's segments, and every
    unit is computed and updated.

    `compact` and `expand` convert path-keyed trees (parameters, moments, update counts) between
    their full form and what a step trains. `trained` are the arrays that the loss is differentiated
    by; `bind`, traced inside the loss, makes the model of them. `dense_forward`: the forward pass
    has omitted units too, and the backward pass alone omits them.
    """

    layout: Layout[Decoder]
    plan: Plan
    dense_forward: bool = False
    selection: ClassVar[Selection | None] = None
    computes_omitted: ClassVar[bool] = False
    """Whether omitted units are computed all the same, and multiplied by 0."""

    def compact(self, tree: Tree, kept: Kept) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the tree that is trained, and what of it is not: nothing."""
        del kept
        return self.map_segments(lambda _path, _number, part: part, tree), {}

    def expand(self, tree: Tree, omitted: Tree, kept: Kept) -> dict[str, Any]:
        """Return the full tree: the inverse of `compact`, bit for bit."""
        del omitted, kept
        return {path: join_segments(value) for path, value in tree.items()}

    def trained(self, params: Tree, kept: Kept) -> dict[str, Any]:
        """Return the arrays that the loss is differentiated by."""
        del kept
        return {path: value for path, value in params.items() if self.layout.leaves[path].trained}

    def bind(
        self, trained: Tree, params: Tree, omitted: Tree, kept: Kept, corrections: Corrections
    ) -> Decoder:
        """Return the model. `params` and `omitted` are what `compact` returned of the parameters;
        `corrections` are added to kept output rows."""
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
        """Return the state after one step, by `factor` times the gradients of what is trained."""
        del kept
        return optimizer_step(optimizer, grads, factor, state)

    def map_segments(
        self, function: Callable[[str, int, Any], Any], tree: Tree, *, outside: bool = True
    ) -> dict[str, Any]:
        """Return `function(path, segment number, part)` for each segment of each array in the
        layers, as tuples; arrays outside the layers as they are, if they are asked for."""
        result: dict[str, Any] = {}
        for path, value in tree.items():
            if self.layout.leaves[path].in_layers:
                parts = value if isinstance(value, tuple) else self._split(value)
                result[path] = tuple(function(path, n, part) for n, part in enumerate(parts))
            elif outside:
                result[path] = value
        return result

    def kept_of(self, path: str, kept: Mapping[str, Array]) -> Array | None:
        """Return the kept indices of the unit that the array has an axis of, in one segment; None:
        all its rows are kept."""
        unit = self.layout.unit_of(path, kept)
        return None if unit is None else kept[unit]

    def omitting_branches(self, kept: Kept) -> list[str]:
        """Return the names of the branches that omit units in some segment."""
        units = {unit for segment in kept for unit in segment}
        return sorted({self.layout.units[unit].branch for unit in units})

    def add_complement(self, model: Decoder, values: Tree, kept: Kept, **masks: Any) -> None:
        """Give the branches that omit units a branch of the omitted ones, of `values` by path, for
        the forward pass alone. A branch whose output rows are None in a segment is left out."""
        frozen = {
            path: value if value is None else jax.lax.stop_gradient(value)
            for path, value in values.items()
        }
        others = branches(self.layout.bind(frozen, **masks).layers)
        for name in self.omitting_branches(kept):
            branches(model.layers)[name].complement = others[name]

    def _split(self, value: Array) -> tuple[Array, ...]:
        segments = self.plan.segments
        if len(segments) == 1:
            return (value,)
        return tuple(value[segment.start : segment.stop] for segment in segments)


def join_segments(value: Any) -> Any:
    """Return one array of those of all segments."""
    if not isinstance(value, tuple):
        return value
    return value[0] if len(value) == 1 else jnp.concatenate(value)
