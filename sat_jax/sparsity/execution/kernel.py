"""Kernel execution: full weights stay in place, and kernels compute with their kept rows."""

import dataclasses
from typing import Any

import jax
import optax
from jaxtyping import Array, Float

from sat_jax.nn.decoder import Decoder
from sat_jax.nn.linear import KeptRows
from sat_jax.nn.param import CHANNEL
from sat_jax.ops import KernelConfig
from sat_jax.sparsity.correction import Corrections
from sat_jax.sparsity.execution.base import Execution
from sat_jax.sparsity.execution.state import PARAMS, TrainState, Tree, optimizer_step, path_trees
from sat_jax.sparsity.rows import Kept, complement, gather_layer, gather_rows, scatter_layer


@dataclasses.dataclass(frozen=True)
class Kernel(Execution):
    """No compact copy of all layers exists: kept rows alone have gradients, and the optimizer
    updates them layer by layer in place. `kernel` computes the products of MLPs."""

    kernel: KernelConfig = KernelConfig(128)

    def trained(self, params: Tree, kept: Kept) -> dict[str, Any]:
        """Return the kept rows."""

        def gather(path: str, number: int, part: Array) -> Array:
            indices = self.kept_of(path, kept[number])
            return part if indices is None else gather_rows(part, indices)

        return self.map_segments(gather, super().trained(params, kept))

    def bind(
        self, trained: Tree, params: Tree, omitted: Tree, kept: Kept, corrections: Corrections
    ) -> Decoder:
        """Return the full model whose weights are their kept rows."""
        del omitted
        assert not corrections, "corrections are for executions whose output rows are arrays"
        assert self.passes != "weights", "the kernels compute no product with all rows"

        def view(path: str, number: int, full: Array) -> Any:
            indices, rows = self.kept_of(path, kept[number]), trained.get(path)
            if indices is None:
                return full if rows is None else rows[number]
            return self._kept_rows(path, full, None if rows is None else rows[number], indices)

        def complement_view(path: str, number: int, full: Array) -> Any:
            indices = self.kept_of(path, kept[number])
            if indices is None:
                return None if self.layout.leaves[path].role == "write" else full
            others = complement(indices, full.shape[indices.ndim - 1])
            return self._kept_rows(path, full, None, others)

        outside = {p: v for p, v in trained.items() if not self.layout.leaves[p].in_layers}
        model = self.layout.bind(self.map_segments(view, params) | outside)
        if self.passes == "backward" and any(kept):
            self.add_complement(model, self.map_segments(complement_view, params), kept)
        return model

    def update(
        self,
        optimizer: optax.GradientTransformation,
        grads: dict[str, Any],
        factor: Float[Array, ""],
        state: TrainState,
        kept: Kept,
    ) -> TrainState:
        """Return the state after one step; the optimizer has to be elementwise.

        Layer by layer, so that of the kept rows' gradients, parameters and moments no more than one
        layer's are copied.
        """
        values, structure = path_trees(state)
        frozen = {path: x for path, x in state.params.items() if path not in grads}
        values[PARAMS] = {path: state.params[path] for path in grads}

        def step(trees: list[Any], gradients: dict[str, Array]) -> list[Any]:
            part: TrainState = jax.tree.unflatten(structure, trees)
            return path_trees(optimizer_step(optimizer, gradients, factor, part))[0]

        def outside(tree: Any) -> Any:
            return _select(tree, lambda path: not self.layout.leaves[path].in_layers)

        trees = [outside(tree) for tree in values]
        updated = step(trees, outside(grads))
        parts = [self._update_segment(step, values, grads, n, kept[n]) for n in range(len(kept))]
        for number, tree in enumerate(updated):
            if isinstance(tree, dict):
                paths = parts[0][number]
                tree |= {path: tuple(part[number][path] for part in parts) for path in paths}
        updated[PARAMS] |= frozen
        after: TrainState = jax.tree.unflatten(structure, updated)
        return after

    def _update_segment(
        self, step: Any, values: list[Any], grads: dict[str, Any], number: int, kept: Any
    ) -> list[Any]:
        """Return the trees of one segment after the step, and the scalars as they were."""

        def of_segment(tree: Any) -> Any:
            layers = _select(tree, lambda path: self.layout.leaves[path].in_layers)
            if not isinstance(layers, dict):
                return layers
            return {path: parts[number] for path, parts in layers.items()}

        inside, gradients = [of_segment(tree) for tree in values], of_segment(grads)

        def step_layer(layer: Array, trees: list[Any]) -> list[Any]:
            def gather(tree: Any) -> Any:
                if not isinstance(tree, dict):
                    return tree
                return {p: gather_layer(x, self.kept_of(p, kept), layer) for p, x in tree.items()}

            def scatter(rows: Any, tree: Any) -> Any:
                if not isinstance(tree, dict):
                    return tree
                return {
                    p: scatter_layer(x, rows[p], self.kept_of(p, kept), layer)
                    for p, x in tree.items()
                }

            rows = [gather(tree) for tree in trees]
            layer_grads = {
                path: jax.lax.dynamic_slice_in_dim(gradients[path], layer, 1)
                for path in rows[PARAMS]
            }
            # Were they not all there before the first is written, XLA would read what it
            # overwrites, and therefore copy everything first.
            rows = jax.lax.optimization_barrier(step(rows, layer_grads))
            return [scatter(part, tree) for part, tree in zip(rows, trees, strict=True)]

        layers = self.plan.segments[number].layers
        updated: list[Any] = jax.lax.fori_loop(0, layers, step_layer, inside)
        return updated

    def _kept_rows(self, path: str, full: Array, rows: Array | None, kept: Array) -> KeptRows:
        leaf = self.layout.leaves[path]
        has_kernel = CHANNEL in leaf.axes and leaf.role != "vector"
        return KeptRows(full, rows, kept, self.kernel if has_kernel else None)


def _select(tree: Any, chosen: Any) -> Any:
    """Return the entries of a path-keyed tree whose path is chosen, scalars as they are."""
    if not isinstance(tree, dict):
        return tree
    return {path: value for path, value in tree.items() if chosen(path)}
