"""Blocks execution: block-sparse matrices, of which only the stored blocks exist."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from sat_jax.nn.block_sparse import BlockSparse, exchange_blocks, scatter_blocks, take_blocks
from sat_jax.nn.decoder import Decoder
from sat_jax.ops import Implementation
from sat_jax.sparsity.correction import Corrections
from sat_jax.sparsity.execution.base import Execution, join_segments
from sat_jax.sparsity.execution.state import Tree
from sat_jax.sparsity.rows import Kept


@dataclasses.dataclass(frozen=True)
class Blocks(Execution):
    """Stored blocks of the matrices at the paths in `kept`, whose values are masks of blocks.

    Entries outside the blocks are not stored: `expand` returns 0 there, in parameters, moments and
    update counts. A block has one update count, and each entry of the full array its own.
    """

    implementation: Implementation | None = None

    def compact(self, tree: Tree, kept: Kept) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the blocks, and an empty tree of what is omitted."""

        def take(path: str, number: int, part: Array) -> Array:
            mask = kept[number].get(path)
            if mask is None:
                return part
            shape = len(part), *self.layout.shapes[path].shape[1:]
            blocks = take_blocks(_to_entries(part, shape), mask)
            return blocks[..., 0, 0] if _is_count(part) else blocks

        return self.map_segments(take, tree), {}

    def expand(self, tree: Tree, omitted: Tree, kept: Kept) -> dict[str, Any]:
        """Return the full tree, with zeros outside the blocks."""
        del omitted

        def scatter(path: str, number: int, part: Array) -> Array:
            mask = kept[number].get(path)
            if mask is None:
                return part
            blocks = _to_entries(part, (*part.shape[:2], mask.block, mask.block))
            return scatter_blocks(blocks, mask).reshape(-1, *self.layout.shapes[path].shape[1:])

        full = self.map_segments(scatter, tree)
        return {path: join_segments(value) for path, value in full.items()}

    def exchange(self, tree: Tree, old: Kept, new: Kept) -> dict[str, Any]:
        """Return the compact tree for other kept blocks: 0 in those that were not kept before."""

        def exchange(path: str, number: int, part: Array) -> Array:
            mask = old[number].get(path)
            return part if mask is None else exchange_blocks(part, mask, new[number][path])

        return self.map_segments(exchange, tree)

    def bind(
        self, trained: Tree, params: Tree, omitted: Tree, kept: Kept, corrections: Corrections
    ) -> Decoder:
        """Return the model whose weights are these blocks."""
        del omitted
        assert not corrections, "corrections are for executions whose output rows are arrays"

        def view(path: str, number: int, part: Array) -> Any:
            mask = kept[number].get(path)
            if mask is None:
                return part
            units = self.layout.shapes[path].shape[1:-1]
            return BlockSparse(part, mask, units, self.implementation)

        return self.layout.bind(self.map_segments(view, {**params, **trained}))


def _is_count(array: Array) -> bool:
    return jnp.issubdtype(array.dtype, jnp.integer)


def _to_entries(array: Array, shape: tuple[int, ...]) -> Array:
    """Return the array, or update counts of its leading axes, with an entry for each of `shape`."""
    missing = len(shape) - array.ndim
    return jnp.broadcast_to(array.reshape(*array.shape, *(1,) * missing), shape)
