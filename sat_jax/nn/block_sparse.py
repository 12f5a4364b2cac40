"""Block-sparse weights: the stored blocks of a matrix, and where they are.

The values, their gradients and their moments have an entry for each stored block alone. Every block
row stores equally many blocks, so that the work is balanced, also over a mesh that splits rows.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, Self

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from sat_jax.nn.linear import PRODUCT, Axes, Weight
from sat_jax.nn.mesh_axes import TENSOR
from sat_jax.nn.param import BLOCK, BLOCK_ROW, INDEX
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
    data_fields=("blocks", "columns"),
    meta_fields=("units", "width", "longest", "implementation"),
)
@dataclasses.dataclass(frozen=True)
class BlockSparse(Weight):
    """A weight `[*L, *units, D]` that is zero outside the stored blocks of its matrix `[N, D]`.

    N is the product of `units`, the sizes of all axes but layer and last, and D is `width` blocks.
    Block row r stores its blocks at the block columns `columns[r]`, sorted; `longest` is the most
    blocks that a block column may store. `implementation`: that of the kernels by name; None
    chooses.
    """

    blocks: Float[Array, "*L R k b b"]
    columns: Int[Array, "*L R k"]
    units: tuple[int, ...]
    width: int
    longest: int
    implementation: Implementation | None = None

    @classmethod
    def of(
        cls, array: Float[Array, "*axes D"], columns: Int[Array, "*L R k"], longest: int
    ) -> Self:
        """Return the blocks of an array at these block columns."""
        units = array.shape[columns.ndim - 2 : -1]
        width = array.shape[-1] * columns.shape[-2] // math.prod(units)
        return cls(take_blocks(array, columns), columns, units, width, longest)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the array that the weight stands for, of one layer or of all."""
        return *self.blocks.shape[:-4], *self.units, self.width * self.blocks.shape[-1]

    def dense(self) -> Array:
        """Return the array, with zeros outside the blocks, of one layer or of all."""
        return scatter_blocks(self.blocks, self.columns, self.width).reshape(self.shape)

    def describe(self, axes: Axes) -> dict[str, tuple[Axes, bool]]:
        """Return axes of the blocks, which are trained, and of their columns."""
        layer = axes[: -len(self.units) - 1]
        return {
            "blocks": ((*layer, BLOCK_ROW, BLOCK, "row_of_block", "column_of_block"), True),
            "columns": ((*layer, BLOCK_ROW, INDEX), False),
        }

    def project(self, x: Float[Array, "B T D"]) -> Array:
        """Return `x · Wᵀ`, `[B, T, *units]`."""

        def product(x: Array, w: BlockSparse) -> Array:
            return column_matmul(x, w.values, w.mask, implementation=w.implementation)

        y = _over_rows(product, x, self, specs=(P(), P(TENSOR)), result=P(None, None, TENSOR))
        return checkpoint_name(y, PRODUCT).reshape(*y.shape[:-1], *self.units)

    def combine(self, a: Array) -> Float[Array, "B T D"]:
        """Return `a · W` for activations `[B, T, *units]`."""

        def product(a: Array, w: BlockSparse) -> Array:
            return row_matmul(a, w.values, w.mask, implementation=w.implementation)

        flat = a.reshape(*a.shape[:2], -1)
        specs = (P(None, None, TENSOR), P(TENSOR))
        y = _over_rows(product, flat, self, specs=specs, result=P())
        return checkpoint_name(y, PRODUCT)

    @property
    def mask(self) -> BlockMask:
        """The pattern of one layer as kernels take it."""
        block = self.blocks.shape[-1]
        return BlockMask.balanced(self.columns, self.width, block, self.longest)

    @property
    def values(self) -> Float[Array, "nonzero b b"]:
        """The blocks of one layer as kernels take them."""
        return self.blocks.reshape(-1, *self.blocks.shape[-2:])


def block_sparse_mlp(
    up: BlockSparse,
    bias: Float[Array, "*units"],
    down: BlockSparse,
    x: Float[Array, "B T D"],
    activation: Activation,
) -> Float[Array, "B T D"]:
    """Return activation(x · upᵀ + bias) · down, by the implementation of `up`, which is that of
    `down`."""

    def mlp(x: Array, up: BlockSparse, bias: Array, down: BlockSparse) -> Array:
        options: Any = {"activation": activation, "implementation": up.implementation}
        return gelu_mlp(x, up.values, bias, down.values, up.mask, down.mask, **options)

    specs = (P(), P(TENSOR), P(TENSOR), P(TENSOR))
    return _over_rows(mlp, x, up, bias.ravel(), down, specs=specs, result=P())


def take_blocks(
    array: Float[Array, "*axes D"], columns: Int[Array, "*L R k"]
) -> Float[Array, "*L R k b b"]:
    """Return the blocks of an array at these block columns."""
    *layers, rows, _ = columns.shape
    block = math.prod(array.shape[len(layers) : -1]) // rows
    grid = array.reshape(*layers, rows, block, -1, block).swapaxes(-3, -2)
    return grid[_places(columns)]


def scatter_blocks(
    blocks: Float[Array, "*axes"], columns: Int[Array, "*L R k"], width: int
) -> Float[Array, "*L N D"]:
    """Return matrices with these blocks at these block columns, and zeros elsewhere. Blocks without
    axes of their own are entries: a matrix `[*L, R, width]`."""
    inside = blocks.shape[columns.ndim :]
    zeros = jnp.zeros((*columns.shape[:-1], width, *inside), blocks.dtype)
    grid = zeros.at[_places(columns)].set(blocks, unique_indices=True)
    if not inside:
        return grid
    *layers, rows, _ = columns.shape
    return grid.swapaxes(-3, -2).reshape(*layers, rows * inside[0], width * inside[1])


def exchange_blocks(
    values: Float[Array, "*axes"],
    old: Int[Array, "*L R k"],
    new: Int[Array, "*L R n"],
) -> Float[Array, "*axes"]:
    """Return values for the blocks at the columns `new`: those of `old` where they were stored, 0
    elsewhere."""
    same = new[..., :, None] == old[..., None, :]
    slot = jnp.argmax(same, axis=-1)
    stored = jnp.any(same, axis=-1)
    stored = stored.reshape(*stored.shape, *(1,) * (values.ndim - old.ndim))
    return jnp.where(stored, values[_places(slot)], jnp.zeros((), values.dtype))


def _places(columns: Int[Array, "*L R k"]) -> tuple[Array, ...]:
    """Return an index for each axis, that together are the places of the blocks."""
    return *jnp.ogrid[tuple(slice(size) for size in columns.shape)][:-1], columns


def _over_rows(
    function: Callable[..., Array], *arguments: Any, specs: tuple[P, ...], result: P
) -> Array:
    """Return the result of a function of weights whose block rows are split over the mesh axis
    `tensor`: each device computes with its own rows, and a result without that axis is the sum over
    devices."""
    mesh = jax.sharding.get_abstract_mesh()
    if dict(zip(mesh.axis_names, mesh.axis_sizes, strict=True)).get(TENSOR, 1) == 1:
        return function(*arguments)

    def local(*arguments: Any) -> Array:
        y = function(*map(_of_own_rows, arguments))
        return y if TENSOR in result else jax.lax.psum(y, TENSOR)

    mapped: Any = jax.shard_map(
        local, in_specs=specs, out_specs=result, axis_names={TENSOR}, check_vma=False
    )
    return mapped(*arguments)


def _of_own_rows(argument: Any) -> Any:
    """Return an argument on one device; its block columns have no more blocks than it has rows."""
    if not isinstance(argument, BlockSparse):
        return argument
    longest = min(argument.longest, argument.columns.shape[-2])
    return dataclasses.replace(argument, longest=longest)
