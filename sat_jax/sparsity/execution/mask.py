"""Mask execution, the reference: activations of the full model are multiplied by 0 or 1."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float

from sat_jax.nn.decoder import Decoder
from sat_jax.nn.layout import Layout
from sat_jax.sparsity.correction import Corrections
from sat_jax.sparsity.execution.base import Execution
from sat_jax.sparsity.execution.state import (
    TrainState,
    Tree,
    map_arrays,
    map_trees,
    optimizer_step,
)
from sat_jax.sparsity.rows import Kept, add_at_rows, indicator


@dataclasses.dataclass(frozen=True)
class Mask(Execution):
    """Train the full arrays, not split into segments, with masks on the activations.

    `freeze`: parameters and moments of omitted units are not changed; otherwise they are updated
    with a gradient of zero.
    """

    freeze: bool = True
    computes_omitted: ClassVar[bool] = True

    def compact(self, tree: Tree, kept: Kept) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the full tree."""
        del kept
        return dict(tree), {}

    def expand(self, tree: Tree, omitted: Tree, kept: Kept) -> dict[str, Any]:
        """Return the full tree."""
        del omitted, kept
        return dict(tree)

    def bind(
        self, trained: Tree, params: Tree, omitted: Tree, kept: Kept, corrections: Corrections
    ) -> Decoder:
        """Return the full model with masks on its branches."""
        del omitted
        values = {**params, **trained}
        masks = self.masks(kept)
        if self.passes == "weights":
            return self.layout.bind(self._frozen(values, masks))
        corrected = {
            path: self._corrected(path, values[path], parts, kept)
            for path, parts in corrections.items()
        }
        model = self.layout.bind(values | corrected, as_floats(masks))
        if self.passes == "backward" and masks:
            inverse = as_floats({unit: ~mask for unit, mask in masks.items()})
            self.add_complement(model, values, kept, masks=inverse)
        return model

    def update(
        self,
        optimizer: optax.GradientTransformation,
        grads: dict[str, Any],
        factor: Float[Array, ""],
        state: TrainState,
        kept: Kept,
    ) -> TrainState:
        """Return the state after one step."""
        updated = optimizer_step(optimizer, grads, factor, state)
        if not self.freeze:
            return updated
        masks = self.masks(kept)

        def keep(path: str, new: Array, old: Array) -> Array:
            unit = self.layout.unit_of(path, masks)
            return new if unit is None else where_kept(masks[unit], new, old)

        return map_trees(lambda new, old: map_arrays(keep, new, old), updated, state)

    def split_layers(self, value: Array) -> Array:
        """Return the array as it is."""
        return value

    def masks(self, kept: Kept) -> dict[str, Bool[Array, "L *within N"]]:
        """Return `unit_masks` of the plan's segments."""
        return unit_masks(self.layout, [s.layers for s in self.plan.segments], kept)

    def _frozen(self, values: Tree, masks: Mapping[str, Array]) -> dict[str, Any]:
        """Return `values`, in which the rows of omitted units have a gradient of zero."""

        def freeze(path: str, value: Array) -> Array:
            unit = self.layout.unit_of(path, masks)
            if unit is None:
                return value
            return where_kept(masks[unit], value, jax.lax.stop_gradient(value))

        return map_arrays(freeze, values)

    def _corrected(
        self, path: str, value: Array, parts: tuple[Array | None, ...], kept: Kept
    ) -> Array:
        pieces = []
        for segment, more, indices in zip(self.plan.segments, parts, kept, strict=True):
            piece, rows = value[segment.start : segment.stop], self.kept_of(path, indices)
            if rows is not None and more is not None:
                piece = add_at_rows(piece, more, rows)
            pieces.append(piece)
        return jnp.concatenate(pieces)


def unit_masks(
    layout: Layout[Decoder], layers: Sequence[int], kept: Kept
) -> dict[str, Bool[Array, "L *within N"]]:
    """Return masks over all layers, true where a unit is kept, of the units that a segment omits.

    `layers`: the number of layers of each segment.
    """
    masks = {}
    for name in sorted({name for segment in kept for name in segment}):
        unit = layout.units[name]
        sizes = [layout.units[outer].size for outer in unit.within]
        parts = [
            indicator(indices[name], unit.size)
            if name in indices
            else jnp.ones((count, *sizes, unit.size), bool)
            for count, indices in zip(layers, kept, strict=True)
        ]
        masks[name] = parts[0] if len(parts) == 1 else jnp.concatenate(parts)
    return masks


def where_kept(mask: Bool[Array, "L *within N"], new: Array, old: Array) -> Array:
    """Return `new` in the rows of kept units and `old` elsewhere."""
    return jnp.where(jnp.expand_dims(mask, range(mask.ndim, new.ndim)), new, old)


def as_floats(masks: dict[str, Array]) -> dict[str, Float[Array, "L *within N"]]:
    """Return masks as branches multiply by them: 1.0 where a unit is kept and 0.0 elsewhere."""
    return {unit: mask.astype(jnp.float32) for unit, mask in masks.items()}
