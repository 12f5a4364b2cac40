"""The operations as walks over products of tiles: what the Pallas backends have in common.

A backend brings two loops, `contract` and `sample`; which tiles they multiply, and where results
go, is data made here from the pattern.
"""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels.block_sparse_matmul import tuned, xla
from kernels.block_sparse_matmul.patterns import BlockMask, KeptRows, Pattern, Walk
from kernels.block_sparse_matmul.tiles import Misfit, Tiles


class Steps(NamedTuple):
    """Products of two tiles, those of one result in a row: int32 `[n]` each.

    `result` and `factor` count tiles along the last axis, `row` and `column` tiles of the weights.
    A step that is not `live` adds nothing.
    """

    result: Int[Array, " n"]
    factor: Int[Array, " n"]
    row: Int[Array, " n"]
    column: Int[Array, " n"]
    live: Int[Array, " n"]


class Product(NamedTuple):
    """Σ over steps of x[:, factor] · w[row, column], of each pair of `xs` and `ws`.

    One of `xs` serves all `ws`. `transposed`: tiles of w are `[result, factor]`, not `[factor,
    result]`. `summed`: the pairs are added up. `finish` makes the results (`outputs` of them,
    `width` columns each) of the float32 sums and of the tiles of `extras`, which are shaped as the
    results. `factor` and `result` are sizes of tiles. `even`: each result has as many steps, all
    live. `name` is what a profile calls it.
    """

    name: str
    xs: Sequence[Float[Array, "T M"]]
    ws: Sequence[Float[Array, "A B"]]
    steps: Steps
    factor: int
    result: int
    width: int
    transposed: bool
    even: bool
    summed: bool = False
    extras: Sequence[Float[Array, "T N"]] = ()
    outputs: int = 1
    finish: Callable[..., tuple[Array, ...]] = lambda total: (total,)

    @property
    def sums(self) -> int:
        """How many sums a result is made of."""
        return 1 if self.summed else len(self.ws)


def split(refs: Sequence[Any], *counts: int) -> list[Sequence[Any]]:
    """The arguments of a kernel in groups of these sizes."""
    ends = list(itertools.accumulate(counts))
    assert ends[-1] == len(refs)
    return [refs[end - count : end] for end, count in zip(ends, counts, strict=True)]


def finer(product: Product, factor: int) -> Product:
    """The same product in more steps, over tiles of `factor` elements at most. Raises `Misfit`
    where these do not make up the tiles that there are."""
    if product.factor <= factor:
        return product
    if product.factor % factor:
        raise Misfit(f"factor: {factor}, accepted divisors of {product.factor}, and more")
    parts = product.factor // factor
    size = product.steps.result.shape[0] * parts

    def repeat(counter: Int[Array, " n"]) -> Int[Array, " np"]:
        return jnp.repeat(counter, parts, total_repeat_length=size)

    steps = Steps(*map(repeat, product.steps))
    part = jnp.arange(size, dtype=jnp.int32) % parts
    along = "column" if product.transposed else "row"
    cut = {name: getattr(steps, name) * parts + part for name in ("factor", along)}
    return product._replace(factor=factor, steps=steps._replace(**cut))


class Loops(Protocol):
    """A backend, by `NAME`, and `tiles` of its own kind, which raise `Misfit` where it cannot hold
    them. The first two cut an axis that no pattern cuts into blocks, of that many elements, one
    that is summed over and one of a result."""

    NAME: str

    def factor_tile(self, size: int, dtype: jnp.dtype, tiles: Any) -> int: ...

    def result_tile(self, size: int, dtype: jnp.dtype, tiles: Any) -> int: ...

    def refusal(self, dtype: jnp.dtype, width: int, block: int) -> str | None: ...

    def contract(self, product: Product, tiles: Any) -> tuple[Float[Array, "T N"], ...]: ...

    def sample(
        self, a: Float[Array, "T N"], c: Float[Array, "T D"], mask: BlockMask, tiles: Any
    ) -> Float[Array, "nonzero b b"]: ...


def largest_tile(size: int, unit: int, limit: int) -> int:
    """The largest divisor of an axis that is a multiple of `unit` and not above `limit`, or 0."""
    return max((n for n in range(unit, limit + 1, unit) if size % n == 0), default=0)


@dataclasses.dataclass(frozen=True)
class Tiled:
    """The operations by one backend's loops. See `backends.Backend`.

    With these `tiles`; None: with the fastest in the `folder` of measurements for the device at
    hand, or else the default.
    """

    loops: Loops
    tiles: Tiles | None = None
    folder: Path = tuned.FOLDER

    def refusal(self, dtype: jnp.dtype, width: int, block: int) -> str | None:
        """Why the loops cannot; None: they can."""
        return self.loops.refusal(dtype, width, block)

    def column(self, x: Array, w: Array, pattern: Pattern) -> Array:
        """x · Wᵀ."""
        tiles = self._tiles("column", x, pattern)
        (y,) = self.loops.contract(self._column("column", x, (w,), pattern, tiles), tiles)
        return y

    def row(self, xs: Sequence[Array], ws: Sequence[Array], pattern: Pattern) -> Array:
        """Σ of x · W over pairs."""
        name = "row" if len(xs) == 1 else "row_pairs"
        tiles = self._tiles(name, xs[0], pattern)
        if isinstance(pattern, KeptRows):
            width = ws[0].shape[1]
            tile = self.loops.result_tile(width, xs[0].dtype, tiles)
            steps = _over_kept_rows(pattern, width // tile)
            product = Product(
                name, xs, ws, steps, pattern.block, tile, width, transposed=False, even=True
            )
        else:
            product = _stored(name, xs, ws, pattern.by_column, pattern.shape[1], pattern.block)
        (y,) = self.loops.contract(product._replace(summed=True), tiles)
        return y

    def sampled(self, a: Array, c: Array, pattern: Pattern, into: Array | None) -> Array:
        """aᵀ · c. Of kept rows it is a dense product, in which nothing sparse is left."""
        if isinstance(pattern, BlockMask):
            return self.loops.sample(a, c, pattern, self._tiles("sampled", a, pattern))
        return xla.sampled(a, c, pattern, into)

    def swiglu(self, x: Array, gate: Array, up: Array, pattern: Pattern) -> Array:
        """silu(x · Gᵀ) · (x · Uᵀ)."""
        tiles = self._tiles("swiglu", x, pattern)
        product = self._column("swiglu", x, (gate, up), pattern, tiles)
        (h,) = self.loops.contract(product._replace(finish=_activate), tiles)
        return h

    def swiglu_gradients(
        self, x: Array, gate: Array, up: Array, dh: Array, pattern: Pattern
    ) -> tuple[Array, Array, Array]:
        """The gradients of x · Gᵀ and x · Uᵀ, which are computed once more, and what `swiglu` makes
        of them."""
        tiles = self._tiles("swiglu_gradients", x, pattern)
        product = self._column("swiglu_gradients", x, (gate, up), pattern, tiles)
        product = product._replace(finish=_activate_gradients, extras=(dh,), outputs=3)
        dg, du, h = self.loops.contract(product, tiles)
        return dg, du, h

    def _column(
        self, name: str, x: Array, ws: Sequence[Array], pattern: Pattern, tiles: Tiles
    ) -> Product:
        if isinstance(pattern, BlockMask):
            product = _stored(name, (x,), ws, pattern.by_row, pattern.shape[0], pattern.block)
            return product._replace(transposed=True)
        width = ws[0].shape[1]
        tile = self.loops.factor_tile(width, x.dtype, tiles)
        steps = _along_kept_rows(pattern, width // tile)
        kept = pattern.kept
        return Product(name, (x,), ws, steps, tile, pattern.block, kept, transposed=True, even=True)

    def _tiles(self, operation: str, x: Array, pattern: Pattern) -> Tiles:
        known = self.loops.NAME, pattern.kind, operation, str(x.dtype), pattern.block
        case = tuned.Case(*known, tokens=x.shape[0])
        return self.tiles or tuned.best(tuned.device_kind(), case, self.folder)


def _activate(g: Array, u: Array) -> tuple[Array]:
    return (g * _sigmoid(g) * u,)


def _activate_gradients(g: Array, u: Array, dh: Array) -> tuple[Array, Array, Array]:
    # Of the ways to write it the one that spills no register on Hopper by any jax: `make aot`.
    s = _sigmoid(g)
    us = u * s
    h = g * us
    return dh * (us + h * (1 - s)), dh * (g * s), h


def _sigmoid(x: Array) -> Array:
    return 1 / (1 + jnp.exp(-x))


def _along_kept_rows(pattern: KeptRows, parts: int) -> Steps:
    """Each kept block is a result, summed over `parts` tiles along its rows."""
    kept = pattern.ids.shape[0]
    result, factor = _grid(kept, parts)
    ids = jnp.repeat(pattern.ids, parts, total_repeat_length=kept * parts)
    return Steps(result, factor, ids, factor, jnp.ones_like(result))


def _over_kept_rows(pattern: KeptRows, parts: int) -> Steps:
    """`parts` results along the rows, each summed over all kept blocks."""
    result, factor = _grid(parts, pattern.ids.shape[0])
    return Steps(result, factor, jnp.tile(pattern.ids, parts), result, jnp.ones_like(result))


def _grid(outer: int, inner: int) -> tuple[Int[Array, " n"], Int[Array, " n"]]:
    """All pairs of two counters, the second running faster."""
    place = jnp.arange(outer * inner, dtype=jnp.int32)
    return place // inner, place % inner


def _stored(
    name: str, xs: Sequence[Array], ws: Sequence[Array], walk: Walk, results: int, block: int
) -> Product:
    """Blocks that are stored one below the other."""
    steps = Steps(walk.result, walk.factor, walk.slot, jnp.zeros_like(walk.slot), walk.live)
    flat = [w.reshape(-1, block) for w in ws]
    return Product(
        name, xs, flat, steps, block, block, results * block, transposed=False, even=False
    )
