"""Implementation in plain XLA, for every platform and size.

For kept rows it gathers the kept weights and computes a smaller dense product.

For a block mask on a CPU, each block row of the result is one product of its stored blocks with the
gathered tiles of the other operand: only stored blocks and padding are multiplied (`BlockLists`).
A tile is contiguous in column-major arrays `[T, N]`, which element-wise functions between two
products keep column-major (`with_layout_constraint`). A loop over the block rows keeps the gathered
tiles in the cache.

A dense product of the full matrix, zeros included, replaces it where the longest list has more
than half of the blocks of the full matrix (`is_listed`), and on other platforms.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, DTypeLike, Float, Int

from kernels.block_sparse_matmul.patterns import BlockLists, BlockMask, KeptRows, Pattern
from kernels.block_sparse_matmul.reference import scatter

_SORTED: dict[str, Any] = {"indices_are_sorted": True, "unique_indices": True}
_COLUMN_MAJOR, _ROW_MAJOR = Layout((1, 0)), Layout((0, 1))


def column(x: Array, w: Array, pattern: Pattern) -> Array:
    """x · Wᵀ."""
    return _column(x, w, pattern, x.dtype)


def row(xs: Sequence[Array], ws: Sequence[Array], pattern: Pattern) -> Array:
    """Σ x · W over the pairs (x, W)."""
    products = [_row(x, w, pattern) for x, w in zip(xs, ws, strict=True)]
    return sum(products[1:], products[0]).astype(xs[0].dtype)


def sampled(a: Array, c: Array, mask: BlockMask) -> Array:
    """aᵀ · c at the blocks of the mask."""
    if is_listed(mask.row_lists, mask.shape[1]):
        return on_cpu(_sampled_by_lists, _sampled_dense, a, c, mask)
    return _sampled_dense(a, c, mask)


def swiglu(x: Array, gate: Array, up: Array, pattern: Pattern) -> Array:
    """silu(x · Gᵀ) · (x · Uᵀ)."""
    g, u = (_column(x, w, pattern, jnp.float32) for w in (gate, up))
    return _activate(g, u).astype(x.dtype)


def swiglu_gradients(
    x: Array, gate: Array, up: Array, dh: Array, pattern: Pattern
) -> tuple[Array, Array, Array]:
    """Return the gradients of x · Gᵀ and x · Uᵀ, and the result of `swiglu`."""
    g, u = (_column(x, w, pattern, jnp.float32) for w in (gate, up))
    h, vjp = jax.vjp(_activate, g, u)
    dg, du = vjp(dh.astype(jnp.float32))
    return dg.astype(x.dtype), du.astype(x.dtype), h.astype(x.dtype)


def refusal(_dtype: jnp.dtype, _width: int, _block: int) -> str | None:
    """Return None: every dtype and size is supported."""
    return None


def is_listed(lists: BlockLists, tiles: int) -> bool:
    """Whether a product by lists is used for results that are sums over `tiles` blocks if dense."""
    return 2 * lists.slot.shape[-1] <= tiles


def _activate(g: Array, u: Array) -> Array:
    return jax.nn.silu(g) * u


def _column(x: Array, w: Array, pattern: Pattern, dtype: DTypeLike) -> Array:
    """Return x · Wᵀ as an array of `dtype`."""

    def dense(x: Array, w: Array, pattern: Pattern) -> Array:
        return jnp.matmul(x, _dense(w, pattern).T, preferred_element_type=dtype)

    def listed(x: Array, w: Array, mask: BlockMask) -> Array:
        return _product_by_lists(x, w, mask.row_lists, dtype)

    if isinstance(pattern, BlockMask) and is_listed(pattern.row_lists, pattern.shape[1]):
        return on_cpu(listed, dense, x, w, pattern)
    return dense(x, w, pattern)


def _row(x: Array, w: Array, pattern: Pattern) -> Array:
    """Return x · W as a float32 array."""

    def dense(x: Array, w: Array, pattern: Pattern) -> Array:
        return jnp.matmul(x, _dense(w, pattern), preferred_element_type=jnp.float32)

    def listed(x: Array, w: Array, mask: BlockMask) -> Array:
        return _product_by_lists(x, w.swapaxes(1, 2), mask.column_lists, jnp.float32)

    if isinstance(pattern, BlockMask) and is_listed(pattern.column_lists, pattern.shape[0]):
        return on_cpu(listed, dense, x, w, pattern)
    return dense(x, w, pattern)


def on_cpu(listed: Callable[..., Array], dense: Callable[..., Array], *operands: Any) -> Array:
    """Return `listed(*operands)` on a CPU, and `dense(*operands)` on other platforms."""
    return jax.lax.platform_dependent(*operands, cpu=listed, default=dense)


def _product_by_lists(
    x: Float[Array, "T D"], w: Float[Array, "nonzero b b"], lists: BlockLists, dtype: DTypeLike
) -> Float[Array, "T N"]:
    """Return x times the transposed stored blocks; block i of the result sums over list i."""
    tiles = _tiles(x, w.shape[-1])

    def product(operands: tuple[Array, Array]) -> Array:
        blocks, reduction = operands
        return jnp.matmul(blocks, gather(tiles, reduction), preferred_element_type=dtype)

    y = jax.lax.map(product, (stored_rows(w, lists), lists.reduction))
    return with_layout_constraint(y.reshape(-1, x.shape[0]).T, _COLUMN_MAJOR)


def _sampled_by_lists(
    a: Float[Array, "T N"], c: Float[Array, "T D"], mask: BlockMask
) -> Float[Array, "nonzero b b"]:
    tiles = _tiles(c, mask.block)

    def product(operands: tuple[Array, Array]) -> Array:
        tile, reduction = operands
        return jnp.matmul(tile, gather(tiles, reduction).T)

    products = jax.lax.map(product, (_tiles(a, mask.block), mask.row_lists.reduction))
    return blocks_of_rows(products, mask)


def _sampled_dense(a: Array, c: Array, mask: BlockMask) -> Array:
    (rows, columns), block = mask.shape, mask.block
    blocks = jnp.matmul(a.T, c).reshape(rows, block, columns, block).swapaxes(1, 2)
    return blocks[mask.rows, mask.columns]


def stored_rows(w: Float[Array, "nonzero b b"], lists: BlockLists) -> Float[Array, "R b kb"]:
    """Return the stored blocks of each list side by side, with zeros in padding."""
    results, length, block = *lists.slot.shape, w.shape[-1]
    blocks = w.at[lists.slot].get(mode="fill", fill_value=0)
    return blocks.swapaxes(1, 2).reshape(results, block, length * block)


def blocks_of_rows(rows: Float[Array, "R b kb"], mask: BlockMask) -> Float[Array, "nonzero b b"]:
    """Return the stored blocks from the rows that `stored_rows` returns."""
    block, slot = mask.block, mask.row_lists.slot
    blocks = rows.reshape(*slot.shape[:1], block, slot.shape[1], block).swapaxes(1, 2)
    # The stored blocks of a row are adjacent in row-major order.
    position = jnp.arange(mask.nonzero) - slot[mask.rows, 0]
    return blocks[mask.rows, position]


def _tiles(x: Float[Array, "T N"], block: int) -> Float[Array, "n b T"]:
    features = with_layout_constraint(with_layout_constraint(x, _COLUMN_MAJOR).T, _ROW_MAJOR)
    return features.reshape(-1, block, x.shape[0])


def gather(tiles: Float[Array, "n b T"], index: Int[Array, " k"]) -> Float[Array, "kb T"]:
    """Return the tiles of a list, one below the other."""
    gathered = tiles.at[index].get(mode="promise_in_bounds")
    return gathered.reshape(-1, tiles.shape[-1])


def _dense(w: Array, pattern: Pattern) -> Array:
    if not isinstance(pattern, KeptRows):
        return scatter(w, pattern)
    blocks = w.reshape(-1, pattern.block, w.shape[1])
    kept = blocks.at[pattern.ids].get(mode="promise_in_bounds", **_SORTED)
    return kept.reshape(-1, w.shape[1])
