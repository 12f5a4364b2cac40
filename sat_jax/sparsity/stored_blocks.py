"""Models and training states of which some matrices store blocks alone.

A model with block-sparse weights has a layout of its own: the matrix `layers/mlp/up` becomes the
arrays `layers/mlp/up/blocks`, which are trained, and `layers/mlp/up/columns`, which say where the
blocks are. Everything that reads a layout (sharding, optimizer, FLOPs, checkpoints) applies to it
unchanged. `change_blocks` converts a training state from one pattern to another.
"""

import functools
import math
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from sat_jax.nn.block_sparse import BlockSparse, exchange_blocks, scatter_blocks, take_blocks
from sat_jax.nn.decoder import Decoder
from sat_jax.nn.layout import Layout, make_layout
from sat_jax.nn.mlp import MLP
from sat_jax.nn.param import CHANNEL
from sat_jax.ops import Implementation
from sat_jax.sparsity.block_patterns import Grid, block_grid
from sat_jax.sparsity.execution.state import TrainState, Tree, map_trees
from sat_jax.sparsity.plan import Stored

Columns = Mapping[str, Int[Array, "L R k"]]
"""Block columns of the stored blocks by path of the matrix; no path: all matrices are dense."""


def block_grids(layout: Layout[Any], branches: str, block: int) -> dict[str, Grid]:
    """Return the block grid of each matrix of the branches `mlp`, `attention` (all but MLPs) or
    `all`, by path. Raises `UserError` for a block that does not divide one."""
    grids = {}
    for path, _ in layout.with_role("read", "write"):
        name = path.split("/")[1]
        is_mlp = layout.branches[name].units[-1] == CHANNEL
        if branches == "all" or is_mlp == (branches == "mlp"):
            _, *units, width = layout.shapes[path].shape
            grids[path] = block_grid(path, math.prod(units), width, block)
    return grids


@functools.cache
def block_layout(
    layout: Layout[Decoder], stored: Stored, implementation: Implementation | None = None
) -> Layout[Decoder]:
    """Return the layout of the model whose matrices in `stored` are block-sparse weights."""
    if not stored:
        return layout
    values: dict[str, Any] = dict(layout.shapes)
    for path, counts in stored:
        layers, *units, _ = layout.shapes[path].shape
        places = layers, counts.grid[0], counts.per_row
        values[path] = BlockSparse(
            blocks=_abstract((*places, counts.block, counts.block), layout.shapes[path].dtype),
            columns=_abstract(places, jnp.int32),
            units=tuple(units),
            width=counts.grid[1],
            longest=counts.longest,
            implementation=implementation,
        )
    return make_layout(layout.bind(values))


def has_fused_mlp(layout: Layout[Any], stored: Stored) -> bool:
    """Whether MLPs with GELU are one operation on stored blocks, which saves nothing of them."""
    return any(
        isinstance(branch, MLP) and {f"layers/{name}/up", f"layers/{name}/down"} <= {*dict(stored)}
        for name, branch in layout.branches.items()
    )


def change_blocks(
    state: TrainState, new: Columns, shapes: Mapping[str, jax.ShapeDtypeStruct]
) -> TrainState:
    """Return a training state for other stored blocks: entries that were not stored are 0, in
    parameters, moments and update counts.

    `shapes` are those of the dense parameters. A block has one update count. In a dense matrix each
    entry has its own, since its blocks were not all updated equally often.
    """
    old = columns_of(state.params)
    changed = map_trees(lambda tree: _change_tree(tree, old, new, shapes), state)
    places = {f"{path}/columns": columns for path, columns in new.items()}
    return changed._replace(params=changed.params | places)


def columns_of(params: Tree) -> dict[str, Any]:
    """Return the block columns of the stored blocks by path of the matrix."""
    suffix = "/columns"
    return {name.removesuffix(suffix): x for name, x in params.items() if name.endswith(suffix)}


def dense_reader(
    read: Callable[[str], np.ndarray],
    names: Collection[str],
    shapes: Mapping[str, jax.ShapeDtypeStruct],
) -> Callable[[str], np.ndarray]:
    """Return a function that returns a dense parameter by path, with zeros outside its stored
    blocks if it has any. `read` returns the arrays `names` on the host."""

    def dense(path: str) -> np.ndarray:
        if path in names:
            return read(path)
        blocks, columns = read(f"{path}/blocks"), read(f"{path}/columns").astype(int)
        layers, rows, _, block, _ = blocks.shape
        width = shapes[path].shape[-1] // block
        grid = np.zeros((layers, rows, width, block, block), blocks.dtype)
        np.put_along_axis(grid, columns[..., None, None], blocks, axis=2)
        return grid.swapaxes(2, 3).reshape(shapes[path].shape)

    return dense


def block_norms(
    params: Tree, stored: Stored, shapes: Mapping[str, jax.ShapeDtypeStruct]
) -> dict[str, Float[Array, "L R C"]]:
    """Return the mean absolute value of each block of these matrices, 0 where it is not stored."""
    norms = {}
    for path, counts in stored:
        rows, width = counts.grid
        if path in params:
            layers = shapes[path].shape[0]
            grid = jnp.abs(params[path]).reshape(layers, rows, counts.block, width, counts.block)
            norms[path] = jnp.mean(grid, axis=(2, 4))
        else:
            means = jnp.mean(jnp.abs(params[f"{path}/blocks"]), axis=(-2, -1))
            norms[path] = scatter_blocks(means, params[f"{path}/columns"], width)
    return norms


def _change_tree(
    tree: Tree, old: Columns, new: Columns, shapes: Mapping[str, jax.ShapeDtypeStruct]
) -> dict[str, Array]:
    """Return a tree without the columns, whose matrices have the blocks of `new`."""
    places = {f"{path}/columns" for path in old}
    result = {}
    for name, array in tree.items():
        path = name.removesuffix("/blocks")
        if path in old and path in new:
            result[name] = exchange_blocks(array, old[path], new[path])
        elif path in old and name not in places:
            result[path] = _to_dense(array, old[path], shapes[path].shape)
        elif path in new:
            blocks = take_blocks(array, new[path])
            result[f"{path}/blocks"] = blocks[..., 0, 0] if _is_count(array) else blocks
        elif name not in places:
            result[name] = array
    return result


def _to_dense(array: Array, columns: Array, shape: tuple[int, ...]) -> Array:
    layers, rows, width = *columns.shape[:2], shape[-1]
    block = math.prod(shape) // (layers * rows * width)
    if _is_count(array):
        array = jnp.broadcast_to(array[..., None, None], (*array.shape, block, block))
    return scatter_blocks(array, columns, width // block).reshape(shape)


def _is_count(array: Array) -> bool:
    return jnp.issubdtype(array.dtype, jnp.integer)


def _abstract(shape: tuple[int, ...], dtype: Any) -> Any:
    return jax.ShapeDtypeStruct(shape, dtype)
