"""Gather execution: what is kept between two refreshes is a smaller dense model."""

import dataclasses
from typing import Any

import jax

from sat_jax.nn.decoder import Decoder
from sat_jax.nn.partly_trained import PartlyTrained, join_rows
from sat_jax.sparsity.correction import Corrections
from sat_jax.sparsity.execution.base import Execution, join_segments
from sat_jax.sparsity.execution.state import Tree
from sat_jax.sparsity.rows import Kept, gather_complement, gather_rows, merge_rows


@dataclasses.dataclass(frozen=True)
class Gather(Execution):
    """Rows of kept units, gathered when a rung is entered and merged when it is left."""

    def compact(self, tree: Tree, kept: Kept) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the kept rows, and the omitted ones (None in a segment that keeps all). Together
        they are as large as the tree; nothing is in both."""
        balance = self.plan.balance

        def gather(path: str, number: int, part: Any) -> Any:
            indices = self.kept_of(path, kept[number])
            return part if indices is None else gather_rows(part, indices, balance)

        def gather_others(path: str, number: int, part: Any) -> Any:
            indices = self.kept_of(path, kept[number])
            return None if indices is None else gather_complement(part, indices, balance)

        others = self.map_segments(gather_others, tree, outside=False)
        omitted = {p: parts for p, parts in others.items() if any(x is not None for x in parts)}
        return self.map_segments(gather, tree), omitted

    def expand(self, tree: Tree, omitted: Tree, kept: Kept) -> dict[str, Any]:
        """Return the full tree."""

        def merge(path: str, number: int, rows: Any) -> Any:
            indices = self.kept_of(path, kept[number])
            if indices is None:
                return rows
            return merge_rows(rows, omitted[path][number], indices, self.plan.balance)

        merged = self.map_segments(merge, tree)
        return {path: join_segments(value) for path, value in merged.items()}

    def bind(
        self, trained: Tree, params: Tree, omitted: Tree, kept: Kept, corrections: Corrections
    ) -> Decoder:
        """Return the smaller model. If the backward pass alone omits units, these are beside it; if
        weight gradients alone are omitted, their rows are constants of its weights."""
        values = {**params, **trained}
        if self.passes == "weights" and omitted:
            return self.layout.bind(self._with_frozen_rows(values, omitted, kept))
        corrected = {
            path: tuple(
                rows if more is None else rows + more
                for rows, more in zip(values[path], parts, strict=True)
            )
            for path, parts in corrections.items()
        }
        model = self.layout.bind(values | corrected)
        if self.passes == "backward" and omitted:
            self.add_complement(model, values | dict(omitted), kept)
        return model

    def _with_frozen_rows(self, values: Tree, omitted: Tree, kept: Kept) -> dict[str, Any]:
        """Return `values` with all rows of which the omitted ones have no gradient."""

        def join(path: str, number: int, rows: Any) -> Any:
            name, leaf = self.layout.unit_of(path, kept[number]), self.layout.leaves[path]
            if name is None:
                return rows
            frozen = jax.lax.stop_gradient(omitted[path][number])
            axis = leaf.axis(name) - len(leaf.axes)
            parts = 1 if self.layout.units[name].within else self.plan.balance
            if leaf.role in ("read", "write"):
                return PartlyTrained(rows, frozen, axis, parts)
            return join_rows(rows, frozen, axis, parts)

        return self.map_segments(join, values)
