"""A fused MLP of two block-sparse matrices and a GELU, with its gradients.

On a CPU, with short lists of blocks (`xla.is_listed`), a loop over the block rows of both matrices
computes one block of hidden features of all tokens at a time, and adds its part of the result to
tiles of the model width. No array of all hidden features is written. Everywhere else the same MLP
is composed of `column_matmul` and `row_matmul`.

The backward pass computes the hidden features again: x is the only residual of activations.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels.block_sparse_matmul import xla
from kernels.block_sparse_matmul.api import (
    check_operand,
    column_matmul,
    flatten,
    matrix_sizes,
    row_matmul,
    unflatten,
)
from kernels.block_sparse_matmul.patterns import BlockMask, as_array
from kernels.block_sparse_matmul.reference import ACTIVATIONS, Activation


class Weights(NamedTuple):
    """Stored blocks of the matrices `up` and `down` [F, D], and the bias of the hidden features."""

    up: Float[Array, "nonzero b b"]
    bias: Float[Array, " F"]
    down: Float[Array, "nonzero b b"]


class Masks(NamedTuple):
    """The patterns of both matrices."""

    up: BlockMask
    down: BlockMask


def gelu_mlp(
    x: Float[Array, "*B D"],
    up: Float[Array, "nonzero_up b b"],
    bias: Float[Array, " F"],
    down: Float[Array, "nonzero_down b b"],
    up_mask: BlockMask,
    down_mask: BlockMask,
    *,
    activation: Activation,
    implementation: str | None = None,
) -> Float[Array, "*B D"]:
    """Return activation(x · Uᵀ + bias) · W of matrices U and W (`down`), both [F, D].

    `activation`: `gelu`, or its tanh approximation `gelu_new`. There is no fused Pallas kernel: a
    Pallas `implementation` computes the two products. Forward and backward pass compute 7 products,
    also under `jax.checkpoint`.
    """
    x, up, bias, down = map(as_array, ("x", *Weights._fields), (x, up, bias, down))
    for name, mask in (("up_mask", up_mask), ("down_mask", down_mask)):
        if not isinstance(mask, BlockMask):
            raise TypeError(f"{name}: {type(mask).__name__}, expected a BlockMask")
    features, width = matrix_sizes("up", up, up_mask)
    if matrix_sizes("down", down, down_mask) != (features, width):
        sizes = list(matrix_sizes("down", down, down_mask))
        raise ValueError(f"down_mask: a matrix {sizes}, expected that of up, {[features, width]}")
    check_operand("x", x, width, up.dtype)
    if down.dtype != up.dtype:
        raise TypeError(f"down: {down.dtype}, expected that of up, {up.dtype}")
    if bias.shape != (features,) or not jnp.issubdtype(bias.dtype, jnp.floating):
        raise ValueError(f"bias: {bias.dtype}{list(bias.shape)}, expected floats [{features}]")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation: {activation!r}, accepted {', '.join(ACTIVATIONS)}")
    weights, masks = Weights(up, bias, down), Masks(up_mask, down_mask)
    return unflatten(_mlp(implementation, activation, flatten(x), weights, masks), x)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _mlp(
    implementation: str | None, activation: Activation, x: Array, weights: Weights, masks: Masks
) -> Array:
    composed = functools.partial(_composed, implementation, activation)
    listed = functools.partial(_by_lists, activation)
    return _choose(implementation, listed, composed, x, weights, masks)


def _forward(implementation: str | None, activation: Activation, *operands: Any) -> Any:
    return _mlp(implementation, activation, *operands), operands


def _backward(
    implementation: str | None, activation: Activation, residuals: Any, dy: Array
) -> tuple[Array, Weights, None]:
    def composed(x: Array, weights: Weights, masks: Masks, dy: Array) -> tuple[Array, Weights]:
        mlp = functools.partial(_composed, implementation, activation, masks=masks)
        return jax.vjp(mlp, x, weights)[1](dy)

    listed = functools.partial(_gradients_by_lists, activation)
    return *_choose(implementation, listed, composed, *residuals, dy), None


_mlp.defvjp(_forward, _backward)


def _choose(
    implementation: str | None,
    listed: Callable[..., Any],
    composed: Callable[..., Any],
    x: Array,
    weights: Weights,
    masks: Masks,
    *operands: Array,
) -> Any:
    """Return `listed(...)` on a CPU where the lists are short, `composed(...)` elsewhere."""
    short = all(xla.is_listed(mask.row_lists, mask.shape[1]) for mask in masks)
    one_block = masks.up.block == masks.down.block
    if implementation in (None, "xla") and short and one_block and x.size:
        return xla.on_cpu(listed, composed, x, weights, masks, *operands)
    return composed(x, weights, masks, *operands)


def _composed(
    implementation: str | None, activation: Activation, x: Array, weights: Weights, masks: Masks
) -> Float[Array, "T D"]:
    z = column_matmul(x, weights.up, masks.up, implementation=implementation)
    h = ACTIVATIONS[activation](z.astype(jnp.float32) + weights.bias[None]).astype(x.dtype)
    return row_matmul(h, weights.down, masks.down, implementation=implementation)


class _Rows(NamedTuple):
    """Both matrices and the bias by block rows: the stored blocks of a row side by side, and the
    indices of the tiles that they multiply."""

    up: Float[Array, "R b ub"]
    bias: Float[Array, "R b"]
    down: Float[Array, "R b db"]
    up_tiles: Int[Array, "R u"]
    down_tiles: Int[Array, "R d"]


def _block_rows(weights: Weights, masks: Masks) -> _Rows:
    up, down = masks.up.row_lists, masks.down.row_lists
    return _Rows(
        xla.stored_rows(weights.up, up),
        weights.bias.astype(jnp.float32).reshape(-1, masks.up.block),
        xla.stored_rows(weights.down, down),
        up.reduction,
        down.reduction,
    )


def _by_lists(
    activation: Activation, x: Array, weights: Weights, masks: Masks
) -> Float[Array, "T D"]:
    tiles = _as_tiles(x, masks.up.block)

    def block_row(y: Array, row: _Rows) -> tuple[Array, None]:
        z = _product(row.up, xla.gather(tiles, row.up_tiles)) + row.bias[:, None]
        h = ACTIVATIONS[activation](z).astype(x.dtype)
        return _add_to_tiles(y, _product(row.down.T, h), row.down_tiles), None

    zeros = jnp.zeros(tiles.shape, jnp.float32)
    y, _ = jax.lax.scan(block_row, zeros, _block_rows(weights, masks))
    return _from_tiles(y).astype(x.dtype)


def _gradients_by_lists(
    activation: Activation, x: Array, weights: Weights, masks: Masks, dy: Array
) -> tuple[Array, Weights]:
    x_tiles, dy_tiles = (_as_tiles(a, masks.up.block) for a in (x, dy))

    def block_row(dx: Array, row: _Rows) -> tuple[Array, Weights]:
        x_row, dy_row = xla.gather(x_tiles, row.up_tiles), xla.gather(dy_tiles, row.down_tiles)
        z = _product(row.up, x_row) + row.bias[:, None]
        h, activation_vjp = jax.vjp(ACTIVATIONS[activation], z)
        (dz,) = activation_vjp(_product(row.down, dy_row))
        h, dz_row = h.astype(x.dtype), dz.astype(x.dtype)
        gradients = Weights(_product(dz_row, x_row.T), dz.sum(axis=1), _product(h, dy_row.T))
        return _add_to_tiles(dx, _product(row.up.T, dz_row), row.up_tiles), gradients

    zeros = jnp.zeros(x_tiles.shape, jnp.float32)
    dx, rows = jax.lax.scan(block_row, zeros, _block_rows(weights, masks))
    gradients = Weights(
        xla.blocks_of_rows(rows.up, masks.up),
        rows.bias.reshape(-1),
        xla.blocks_of_rows(rows.down, masks.down),
    )
    dweights = jax.tree.map(lambda gradient, w: gradient.astype(w.dtype), gradients, weights)
    return _from_tiles(dx).astype(x.dtype), dweights


def _as_tiles(x: Float[Array, "T D"], block: int) -> Float[Array, "n b T"]:
    """Return the column blocks of an array, feature-major. Unlike in `xla`, no layout is set: the
    input of an MLP is row-major, and XLA then copies it once."""
    return x.T.reshape(-1, block, x.shape[0])


def _from_tiles(tiles: Float[Array, "n b T"]) -> Float[Array, "T D"]:
    return tiles.transpose(2, 0, 1).reshape(tiles.shape[-1], -1)


def _add_to_tiles(
    tiles: Float[Array, "n b T"], products: Float[Array, "kb T"], index: Int[Array, " k"]
) -> Float[Array, "n b T"]:
    """Return the tiles plus the products, of which block j is added to tile `index[j]`."""
    shape = (1, *tiles.shape[1:])
    for n, product in zip(index, products.reshape(-1, *shape), strict=True):
        # Unsigned, since jax adds code for negative indices, and with it XLA copies the tile.
        start = (n.astype(jnp.uint32), jnp.uint32(0), jnp.uint32(0))
        tile = jax.lax.dynamic_slice(tiles, start, shape)
        tiles = jax.lax.dynamic_update_slice(tiles, tile + product, start)
    return tiles


def _product(a: Float[Array, "M K"], b: Float[Array, "K N"]) -> Float[Array, "M N"]:
    return jnp.matmul(a, b, preferred_element_type=jnp.float32)
