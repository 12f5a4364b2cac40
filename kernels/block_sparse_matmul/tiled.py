"""The operations as sums of products of tiles: the code that the Pallas backends share.

A backend provides two kernels, `contract` and `sample`. This module computes from the pattern which
tiles they multiply and where the results are written.
"""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels.block_sparse_matmul import tuned
from kernels.block_sparse_matmul.patterns import BlockMask, BlockOrder, KeptRows, Pattern
from kernels.block_sparse_matmul.tiles import Tiles, UnsupportedTiles


class Steps(NamedTuple):
    """Products of two tiles, int32 `[n]` each; steps of one result are adjacent.

    `result` and `reduction` are tile indices along the last axis of y and of x, `row` and `column`
    tile indices in the weights. A step with `valid` 0 adds nothing.
    """

    result: Int[Array, " n"]
    reduction: Int[Array, " n"]
    row: Int[Array, " n"]
    column: Int[Array, " n"]
    valid: Int[Array, " n"]


class Product(NamedTuple):
    """A sum over steps of x[:, reduction] · w[row, column], for each pair of `xs` and `ws`.

    name: the name of the kernel in a profile.
    xs: one for each of `ws`, or one for all.
    tile_k, tile_n: tile sizes along the axis that is summed over and along the result.
    width: columns of a result.
    transposed: tiles of w are `[tile_n, tile_k]`, not `[tile_k, tile_n]`.
    uniform: every result has the same number of steps, all valid.
    sum_pairs: the products of all pairs are added.
    extras: arrays of the shape of the results, whose tiles are passed to `finish`.
    outputs: the number of results.
    finish: computes the result tiles from the float32 sums and the tiles of `extras`.
    """

    name: str
    xs: Sequence[Float[Array, "T M"]]
    ws: Sequence[Float[Array, "A B"]]
    steps: Steps
    tile_k: int
    tile_n: int
    width: int
    transposed: bool
    uniform: bool
    sum_pairs: bool = False
    extras: Sequence[Float[Array, "T N"]] = ()
    outputs: int = 1
    finish: Callable[..., tuple[Array, ...]] = lambda total: (total,)

    @property
    def sums(self) -> int:
        """Number of accumulators of a result tile."""
        return 1 if self.sum_pairs else len(self.ws)


def split(refs: Sequence[Any], *counts: int) -> list[Sequence[Any]]:
    """Split the arguments of a kernel into groups of the given sizes."""
    ends = list(itertools.accumulate(counts))
    assert ends[-1] == len(refs)
    return [refs[end - count : end] for end, count in zip(ends, counts, strict=True)]


def split_reduction(product: Product, tile_k: int) -> Product:
    """Return the same product in more steps, with tiles of at most `tile_k` elements.

    Raises `UnsupportedTiles` if `tile_k` does not divide the current tile size.
    """
    if product.tile_k <= tile_k:
        return product
    if product.tile_k % tile_k:
        raise UnsupportedTiles(
            f"tile_k: {tile_k}, accepted divisors of {product.tile_k}, or at least that"
        )
    parts = product.tile_k // tile_k
    size = product.steps.result.shape[0] * parts

    def repeat(index: Int[Array, " n"]) -> Int[Array, " np"]:
        return jnp.repeat(index, parts, total_repeat_length=size)

    steps = Steps(*map(repeat, product.steps))
    part = jnp.arange(size, dtype=jnp.int32) % parts
    axis = "column" if product.transposed else "row"
    indices = {name: getattr(steps, name) * parts + part for name in ("reduction", axis)}
    return product._replace(tile_k=tile_k, steps=steps._replace(**indices))


class Kernels(Protocol):
    """A module with the kernels of one platform; `tiles` are of its own type.

    `reduction_tile` and `result_tile` return the tile size of an axis that the pattern does not
    divide into blocks. The kernels raise `UnsupportedTiles` for tiles that do not fit.
    """

    NAME: str

    def reduction_tile(self, size: int, dtype: jnp.dtype, tiles: Any) -> int: ...

    def result_tile(self, size: int, dtype: jnp.dtype, tiles: Any) -> int: ...

    def refusal(self, dtype: jnp.dtype, width: int, block: int) -> str | None: ...

    def contract(self, product: Product, tiles: Any) -> tuple[Float[Array, "T N"], ...]: ...

    def sample(
        self, a: Float[Array, "T N"], c: Float[Array, "T D"], mask: BlockMask, tiles: Any
    ) -> Float[Array, "nonzero b b"]: ...


def largest_tile(size: int, unit: int, limit: int) -> int:
    """Return the largest divisor of `size` that is a multiple of `unit` up to `limit`, or 0."""
    return max((n for n in range(unit, limit + 1, unit) if size % n == 0), default=0)


@dataclasses.dataclass(frozen=True)
class Tiled:
    """A `backends.Backend` that computes the operations with the kernels of one platform.

    `tiles`: None takes the fastest in `folder` for the current device, or else the default tiles.
    """

    kernels: Kernels
    tiles: Tiles | None = None
    folder: Path = tuned.FOLDER

    def refusal(self, dtype: jnp.dtype, width: int, block: int) -> str | None:
        """Return why the kernels do not support the arguments, or None if they do."""
        return self.kernels.refusal(dtype, width, block)

    def column(self, x: Array, w: Array, pattern: Pattern) -> Array:
        """x · Wᵀ."""
        tiles = self._tiles("column", x, pattern)
        (y,) = self.kernels.contract(self._column("column", x, (w,), pattern, tiles), tiles)
        return y

    def row(self, xs: Sequence[Array], ws: Sequence[Array], pattern: Pattern) -> Array:
        """Σ x · W over the pairs (x, W)."""
        name = "row" if len(xs) == 1 else "row_pairs"
        tiles = self._tiles(name, xs[0], pattern)
        if isinstance(pattern, KeptRows):
            width = ws[0].shape[1]
            tile_n = self.kernels.result_tile(width, xs[0].dtype, tiles)
            steps = _steps_over_kept_rows(pattern, width // tile_n)
            product = Product(
                name, xs, ws, steps, pattern.block, tile_n, width, transposed=False, uniform=True
            )
        else:
            product = _masked(name, xs, ws, pattern.by_column, pattern.shape[1], pattern.block)
        (y,) = self.kernels.contract(product._replace(sum_pairs=True), tiles)
        return y

    def sampled(self, a: Array, c: Array, mask: BlockMask) -> Array:
        """aᵀ · c at the blocks of the mask."""
        return self.kernels.sample(a, c, mask, self._tiles("sampled", a, mask))

    def swiglu(self, x: Array, gate: Array, up: Array, pattern: Pattern) -> Array:
        """silu(x · Gᵀ) · (x · Uᵀ)."""
        tiles = self._tiles("swiglu", x, pattern)
        product = self._column("swiglu", x, (gate, up), pattern, tiles)
        (h,) = self.kernels.contract(product._replace(finish=_activate), tiles)
        return h

    def swiglu_gradients(
        self, x: Array, gate: Array, up: Array, dh: Array, pattern: Pattern
    ) -> tuple[Array, Array, Array]:
        """Return the gradients of x · Gᵀ and x · Uᵀ, which it recomputes, and SwiGLU's result."""
        tiles = self._tiles("swiglu_gradients", x, pattern)
        product = self._column("swiglu_gradients", x, (gate, up), pattern, tiles)
        product = product._replace(finish=_activate_gradients, extras=(dh,), outputs=3)
        dg, du, h = self.kernels.contract(product, tiles)
        return dg, du, h

    def _column(
        self, name: str, x: Array, ws: Sequence[Array], pattern: Pattern, tiles: Tiles
    ) -> Product:
        block = pattern.block
        if isinstance(pattern, BlockMask):
            product = _masked(name, (x,), ws, pattern.by_row, pattern.shape[0], block)
            return product._replace(transposed=True)
        width = ws[0].shape[1]
        tile_k = self.kernels.reduction_tile(width, x.dtype, tiles)
        steps = _steps_along_kept_rows(pattern, width // tile_k)
        return Product(
            name, (x,), ws, steps, tile_k, block, pattern.kept, transposed=True, uniform=True
        )

    def _tiles(self, operation: str, x: Array, pattern: Pattern) -> Tiles:
        case = tuned.Case(
            *(self.kernels.NAME, pattern.kind, operation, str(x.dtype), pattern.block, x.shape[0])
        )
        return self.tiles or tuned.best_tiles(tuned.device_kind(), case, self.folder)


def _activate(g: Array, u: Array) -> tuple[Array]:
    return (g * _sigmoid(g) * u,)


def _activate_gradients(g: Array, u: Array, dh: Array) -> tuple[Array, Array, Array]:
    # Other equivalent formulas spill registers on Hopper with some versions of jax (`make aot`).
    s = _sigmoid(g)
    us = u * s
    h = g * us
    return dh * (us + h * (1 - s)), dh * (g * s), h


def _sigmoid(x: Array) -> Array:
    return 1 / (1 + jnp.exp(-x))


def _steps_along_kept_rows(pattern: KeptRows, parts: int) -> Steps:
    """Return the steps of one result per kept block, summed over `parts` tiles along its rows."""
    kept = pattern.ids.shape[0]
    result, reduction = _index_pairs(kept, parts)
    ids = jnp.repeat(pattern.ids, parts, total_repeat_length=kept * parts)
    return Steps(result, reduction, ids, reduction, jnp.ones_like(result))


def _steps_over_kept_rows(pattern: KeptRows, parts: int) -> Steps:
    """Return the steps of `parts` results along the rows, each summed over all kept blocks."""
    result, reduction = _index_pairs(parts, pattern.ids.shape[0])
    return Steps(result, reduction, jnp.tile(pattern.ids, parts), result, jnp.ones_like(result))


def _index_pairs(outer: int, inner: int) -> tuple[Int[Array, " n"], Int[Array, " n"]]:
    """Return all pairs of two indices; the second varies fastest."""
    index = jnp.arange(outer * inner, dtype=jnp.int32)
    return index // inner, index % inner


def _masked(
    name: str, xs: Sequence[Array], ws: Sequence[Array], order: BlockOrder, results: int, block: int
) -> Product:
    """Return the product with stored blocks, reshaped to `[nonzero · block, block]`."""
    steps = Steps(
        order.result, order.reduction, order.slot, jnp.zeros_like(order.slot), order.valid
    )
    stacked = [w.reshape(-1, block) for w in ws]
    return Product(
        name, xs, stacked, steps, block, block, results * block, transposed=False, uniform=False
    )
