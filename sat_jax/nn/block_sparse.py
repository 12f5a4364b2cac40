"""Block-sparse weights: the stored blocks of a matrix, and where they are.

The values, their gradients and their moments have an entry for each stored block alone.
"""

import dataclasses
import functools
from typing import Any, Self

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from sat_jax.nn.linear import PRODUCT, Axes, Weight
from sat_jax.nn.param import BLOCK, INDEX
from sat_jax.ops import ACTIVATIONS as ACTIVATIONS
from sat_jax.ops import Activation as Activation
from sat_jax.ops import (
    BlockMask,
    Implementation,
    column_matmul,
    gelu_mlp,
    row_matmul,
)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("blocks", "mask"),
    meta_fields=("units", "implementation"),
)
@dataclasses.dataclass(frozen=True)
class BlockSparse(Weight):
    """A weight `[*L, *units, D]` that is zero outside the stored blocks of its matrix `[N, D]`.

    N is the product of `units`, the sizes of all axes but layer and last. `mask` has the layers in
    front of its arrays, as `blocks` has. `implementation`: that of the kernels by name; None
    chooses.
    """

    blocks: Float[Array, "*L nonzero b b"]
    mask: BlockMask
    units: tuple[int, ...]
    implementation: Implementation | None = None

    @classmethod
    def of(
        cls,
        array: Float[Array, "*axes D"],
        mask: BlockMask,
        implementation: Implementation | None = None,
    ) -> Self:
        """Return the blocks of an array at the places of a mask."""
        units = array.shape[mask.rows.ndim - 1 : -1]
        return cls(take_blocks(array, mask), mask, units, implementation)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the array that the weight stands for."""
        return *self.blocks.shape[:-3], *self.units, self.mask.shape[1] * self.mask.block

    def dense(self) -> Array:
        """Return the array, with zeros outside the blocks, of one layer or of all."""
        return scatter_blocks(self.blocks, self.mask).reshape(self.shape)

    def describe(self, axes: Axes) -> dict[str, tuple[Axes, bool]]:
        """Return axes of the blocks, which are trained, and of the mask's arrays."""
        layer = axes[: -len(self.units) - 1]
        inside: dict[str, tuple[Axes, bool]] = {
            "blocks": ((*layer, BLOCK, "block_row", "block_column"), True)
        }
        for keys, array in jax.tree_util.tree_leaves_with_path(self.mask):
            name = jax.tree_util.keystr(keys, simple=True, separator="/")
            inside[f"mask/{name}"] = (*layer, *(INDEX,) * (array.ndim - len(layer))), False
        return inside

    def project(self, x: Float[Array, "B T D"]) -> Array:
        """Return `x · Wᵀ`, `[B, T, *units]`."""
        y = column_matmul(x, self.blocks, self.mask, implementation=self.implementation)
        return checkpoint_name(y, PRODUCT).reshape(*y.shape[:-1], *self.units)

    def combine(self, a: Array) -> Float[Array, "B T D"]:
        """Return `a · W` for activations `[B, T, *units]`."""
        flat = a.reshape(*a.shape[:2], -1)
        return row_matmul(flat, self.blocks, self.mask, implementation=self.implementation)


def block_sparse_mlp(
    up: BlockSparse,
    bias: Float[Array, "*units"],
    down: BlockSparse,
    x: Float[Array, "B T D"],
    activation: Activation,
) -> Float[Array, "B T D"]:
    """Return activation(x · upᵀ + bias) · down, by the implementation of `up`, which is
    that of `down`."""
    options: Any = {"activation": activation, "implementation": up.implementation}
    return gelu_mlp(x, up.blocks, bias.ravel(), down.blocks, up.mask, down.mask, **options)


def take_blocks(array: Float[Array, "*axes D"], mask: BlockMask) -> Float[Array, "*L nonzero b b"]:
    """Return the blocks of an array at the places of a mask."""
    (rows, columns), block = mask.shape, mask.block
    lead = mask.rows.shape[:-1]
    grid = array.reshape(*lead, rows, block, columns, block).swapaxes(-3, -2)

    def take(grid: Array, row: Array, column: Array) -> Array:
        return grid[row, column]

    return _over(lead, take)(grid, mask.rows, mask.columns)


def scatter_blocks(
    blocks: Float[Array, "*L nonzero b b"], mask: BlockMask
) -> Float[Array, "*L N D"]:
    """Return matrices with these blocks at the places of a mask, and zeros elsewhere."""
    (rows, columns), block = mask.shape, mask.block
    lead = mask.rows.shape[:-1]

    def scatter(blocks: Array, row: Array, column: Array) -> Array:
        zeros = jnp.zeros((rows, columns, block, block), blocks.dtype)
        return zeros.at[row, column].set(blocks)

    grid = _over(lead, scatter)(blocks, mask.rows, mask.columns)
    return grid.swapaxes(-3, -2).reshape(*lead, rows * block, columns * block)


def exchange_blocks(values: Array, old: BlockMask, new: BlockMask) -> Array:
    """Return values `[*L, nonzero, ...]` for the blocks of the mask `new`: those of `old` where it
    has the block, 0 elsewhere."""
    lead = old.rows.shape[:-1]

    def exchange(values: Array, old_places: tuple[Array, ...], new_places: Any) -> Array:
        slots = jnp.full(old.shape, old.nonzero, jnp.int32)
        slots = slots.at[old_places].set(jnp.arange(old.nonzero, dtype=jnp.int32))
        return values.at[slots[new_places]].get(mode="fill", fill_value=0)

    return _over(lead, exchange)(values, (old.rows, old.columns), (new.rows, new.columns))


def _over(lead: tuple[int, ...], function: Any) -> Any:
    """Return the function for arguments with the axes `lead` in front."""
    for _ in lead:
        function = jax.vmap(function)
    return function
