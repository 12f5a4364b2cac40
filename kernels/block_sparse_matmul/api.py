"""Products with matrices of which some blocks take part: differentiable, on any platform.

    pattern = kept_rows(ids, block=128)         # rows of blocks of w [F, D]
    y = swiglu_mlp(x, gate, up, down, pattern)  # [T, D] → [T, D]
    h = column_matmul(x, gate, pattern)         # [T, D] → [T, kept]
    y = row_matmul(h, down, pattern)            # [T, kept] → [T, D]

    pattern = BlockMask.of(kept, block=128)     # any blocks of a matrix [N, D]
    y = column_matmul(x, blocks, pattern)       # [T, D] → [T, N], blocks [nonzero, 128, 128]

Leading axes of the activations are free. Sums are float32 (how exact products of float32 are, is
jax's default for `xla`, the highest for the others), results have the dtype of the operands.
`implementation`: `xla`, `pallas_tpu` (interpreted on other platforms) or `pallas_gpu` (Hopper); a
named one never gives way to another. None is, operation by operation, Pallas where it takes the
shapes and was timed no slower than XLA on this kind of device, else XLA (`explain`). Wrong shapes,
dtypes and blocks are a `ValueError` or `TypeError` before anything runs; wrong ids only under
`jax_enable_checks`, and without it what they do is undefined.
"""

import math

import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels.block_sparse_matmul import vjp
from kernels.block_sparse_matmul.backends import choose
from kernels.block_sparse_matmul.patterns import (
    BlockMask,
    KeptRows,
    Pattern,
    as_array,
    check_ids,
)


def column_matmul(
    x: Float[Array, "*B D"],
    w: Array,
    pattern: Pattern,
    *,
    rows: Float[Array, "N D"] | None = None,
    implementation: str | None = None,
) -> Float[Array, "*B N"]:
    """x · Wᵀ: of each row of W that takes part its product with x.

    `w` is `[F, D]` and N the kept rows, or `[nonzero, block, block]` and N all rows. `rows`: the
    kept rows of `w` once more. They take no part, but the gradient is theirs, as large as they are,
    and `w` has none.
    """
    x, w = as_array("x", x), as_array("w", w)
    height, columns = _sizes("w", w, pattern)
    _check("x", x, columns, w.dtype)
    own = _rows((w,), None if rows is None else (rows,), pattern)
    backend = _choose(implementation, x, columns, pattern)
    if _nothing(x, pattern):
        return jnp.zeros((*x.shape[:-1], height), x.dtype)
    return _leading(vjp.column(backend, _flat(x), w, pattern, own), x)


def row_matmul(
    x: Float[Array, "*B N"],
    w: Array,
    pattern: Pattern,
    *,
    rows: Float[Array, "N D"] | None = None,
    implementation: str | None = None,
) -> Float[Array, "*B D"]:
    """x · W over the rows of W that take part; shapes and `rows` as in `column_matmul`, the other
    way."""
    x, w = as_array("x", x), as_array("w", w)
    height, columns = _sizes("w", w, pattern)
    _check("x", x, height, w.dtype)
    own = _rows((w,), None if rows is None else (rows,), pattern)
    backend = _choose(implementation, x, columns, pattern)
    if _nothing(x, pattern):
        return jnp.zeros((*x.shape[:-1], columns), x.dtype)
    return _leading(vjp.row(backend, (_flat(x),), (w,), pattern, own), x)


def sampled_matmul(
    a: Float[Array, "*B N"],
    c: Float[Array, "*B D"],
    pattern: Pattern,
    *,
    into: Float[Array, "F D"] | None = None,
    implementation: str | None = None,
) -> Array:
    """aᵀ · c where the pattern has blocks, which is the gradient of both products' weights.

    Of a `BlockMask` `[nonzero, block, block]`. Of kept rows these rows alone, `[N, D]`, or, with
    `into`, that matrix with its kept rows replaced, in place where its buffer is given up.
    """
    a, c = as_array("a", a), as_array("c", c)
    if a.shape[:-1] != c.shape[:-1] or not a.ndim or not c.ndim:
        raise ValueError(f"c: {list(c.shape)}, expected the leading axes of a, {list(a.shape)}")
    if isinstance(pattern, BlockMask):
        rows, columns = (count * pattern.block for count in pattern.shape)
        if into is not None:
            raise ValueError("into: a BlockMask stores no other blocks; accepted with kept rows")
    else:
        rows, columns = pattern.kept, c.shape[-1]
        if into is not None and _sizes("into", into, pattern)[1] != columns:
            raise ValueError(f"into: {list(into.shape)}, expected [F, {columns}]")
        if into is not None and into.dtype != a.dtype:
            raise TypeError(f"into: {into.dtype}, and a is {a.dtype}; one float")
    _check("a", a, rows, c.dtype)
    _check("c", c, columns, a.dtype)
    backend = _choose(implementation, a, columns, pattern)
    if _nothing(a, pattern):
        return _no_product(a, c, pattern, into)
    return vjp.sampled(backend, _flat(a), _flat(c), pattern, into)


def swiglu_mlp(
    x: Float[Array, "*B D"],
    gate: Array,
    up: Array,
    down: Array,
    pattern: Pattern,
    *,
    rows: tuple[Array, Array, Array] | None = None,
    implementation: str | None = None,
) -> Float[Array, "*B D"]:
    """(silu(x · Gᵀ) · (x · Uᵀ)) · W, of matrices G, U and W (`down`) that have the same pattern.

    Shapes and `rows`, of all three, as in `column_matmul`. The backward pass keeps x alone and
    computes the first two products once more, the activations with them: 11 products in all, and as
    many where the forward pass itself is computed again (`jax.checkpoint`). The Pallas backends
    never write these two products to memory.
    """
    named = {"x": x, "gate": gate, "up": up, "down": down}
    x, gate, up, down = (as_array(name, value) for name, value in named.items())
    _, columns = _sizes("gate", gate, pattern)
    for name, w in (("up", up), ("down", down)):
        if w.shape != gate.shape or w.dtype != gate.dtype:
            raise ValueError(
                f"{name}: {w.dtype}{list(w.shape)}, expected as gate,"
                f" {gate.dtype}{list(gate.shape)}"
            )
    _check("x", x, columns, gate.dtype)
    ws = gate, up, down
    own = _rows(ws, rows, pattern)
    backend = _choose(implementation, x, columns, pattern)
    if _nothing(x, pattern):
        return jnp.zeros_like(x)
    return _leading(vjp.swiglu_mlp(backend, _flat(x), ws, pattern, own), x)


def _sizes(name: str, w: Array, pattern: Pattern) -> tuple[int, int]:
    """Rows and columns of the matrix that takes part."""
    if not isinstance(pattern, KeptRows | BlockMask):
        raise TypeError(f"pattern: {type(pattern).__name__}, expected of kept_rows or a BlockMask")
    block = pattern.block
    if isinstance(pattern, BlockMask):
        if w.shape != (pattern.nonzero, block, block):
            expected = [pattern.nonzero, block, block]
            raise ValueError(f"{name}: shape {list(w.shape)}, expected {expected}")
        return pattern.shape[0] * block, pattern.shape[1] * block
    if w.ndim != 2 or w.shape[0] % block:
        raise ValueError(
            f"{name}: shape {list(w.shape)}, expected [F, D], F a multiple of the block {block}"
        )
    if pattern.kept > w.shape[0]:
        raise ValueError(
            f"ids: {pattern.ids.shape[0]} of {block} rows, and {name} has {w.shape[0]} rows"
        )
    check_ids(pattern, w.shape[0] // block)
    return pattern.kept, w.shape[1]


def _rows(
    ws: tuple[Array, ...], rows: tuple[Array, ...] | None, pattern: Pattern
) -> tuple[Array, ...] | None:
    """Kept rows that fit the matrices they are of."""
    if rows is None:
        return None
    if isinstance(pattern, BlockMask):
        raise ValueError("rows: a BlockMask stores no other blocks; accepted with kept rows")
    if len(rows) != len(ws):
        raise ValueError(
            f"rows: {len(rows)} matrices, expected {len(ws)}, those of gate, up and down"
        )
    for w, own in zip(ws, rows, strict=True):
        if own.shape != (pattern.kept, w.shape[1]) or own.dtype != w.dtype:
            raise ValueError(
                f"rows: {own.dtype}{list(own.shape)}, expected the kept rows,"
                f" {w.dtype}{[pattern.kept, w.shape[1]]}"
            )
    return rows


def _check(name: str, x: Array, width: int, dtype: jnp.dtype) -> None:
    if x.ndim < 1 or x.shape[-1] != width:
        raise ValueError(f"{name}: shape {list(x.shape)}, expected [..., {width}]")
    if x.dtype != dtype or not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"{name}: {x.dtype}, and what it is multiplied with is {dtype}; one float")


def _choose(implementation: str | None, x: Array, columns: int, pattern: Pattern) -> str:
    return choose(implementation, x.dtype, columns, pattern.block)


def _nothing(x: Array, pattern: Pattern) -> bool:
    blocks = pattern.ids.shape[0] if isinstance(pattern, KeptRows) else pattern.nonzero
    return not blocks or not math.prod(x.shape)


def _no_product(a: Array, c: Array, pattern: Pattern, into: Array | None) -> Array:
    if isinstance(pattern, BlockMask):
        return jnp.zeros((pattern.nonzero, pattern.block, pattern.block), a.dtype)
    if into is None or not pattern.kept:
        return jnp.zeros((pattern.kept, c.shape[-1]), a.dtype) if into is None else into
    blocks = into.reshape(-1, pattern.block, into.shape[1])
    return blocks.at[pattern.ids].set(0).reshape(into.shape)


def _flat(x: Float[Array, "*B N"]) -> Float[Array, "T N"]:
    return x.reshape(-1, x.shape[-1])


def _leading(y: Float[Array, "T N"], x: Float[Array, "*B M"]) -> Float[Array, "*B N"]:
    return y.reshape(*x.shape[:-1], y.shape[-1])
