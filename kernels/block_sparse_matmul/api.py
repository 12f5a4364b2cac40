"""Differentiable products with block-sparse matrices, on any platform.

    pattern = kept_rows(ids, block=128)         # blocks of rows of a matrix [F, D]
    y = swiglu_mlp(x, gate, up, down, pattern)  # [T, D] → [T, D]
    h = column_matmul(x, gate, pattern)         # [T, D] → [T, kept]
    y = row_matmul(h, down, pattern)            # [T, kept] → [T, D]

    pattern = BlockMask.of(kept, block=128)     # any blocks of a matrix [N, D]
    y = column_matmul(x, blocks, pattern)       # [T, D] → [T, N], blocks [nonzero, 128, 128]

`gelu_mlp` has the MLP of two block masks.

Activations may have any leading axes. Sums are float32, and results have the dtype of the operands.
Float32 products have jax's default precision in `xla` and the highest in the other implementations.

`implementation`: `xla`, `pallas_tpu` (interpret mode on other platforms) or `pallas_gpu` (Hopper).
A named implementation is used or refused, never replaced. None chooses for each operation: Pallas
where it supports the shapes and was measured not slower than XLA on this device kind, XLA otherwise
(`explain`).

Unsupported shapes, dtypes and blocks raise a `ValueError` or `TypeError` before anything runs. Ids
are checked under `jax_enable_checks` only; otherwise the result of invalid ids is undefined.
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
    """Return x · Wᵀ.

    With kept rows, `w` is `[F, D]` and N the number of kept rows. With a `BlockMask`, `w` is
    `[nonzero, block, block]` and N the number of all rows. `rows`: a copy of the kept rows of `w`,
    which gets the gradient in place of `w`; its values are not read.
    """
    x, w = as_array("x", x), as_array("w", w)
    height, columns = matrix_sizes("w", w, pattern)
    check_operand("x", x, columns, w.dtype)
    copies = _check_rows((w,), None if rows is None else (rows,), pattern)
    backend = _choose(implementation, x, columns, pattern)
    if _is_empty(x, pattern):
        return jnp.zeros((*x.shape[:-1], height), x.dtype)
    return unflatten(vjp.column(backend, flatten(x), w, pattern, copies), x)


def row_matmul(
    x: Float[Array, "*B N"],
    w: Array,
    pattern: Pattern,
    *,
    rows: Float[Array, "N D"] | None = None,
    implementation: str | None = None,
) -> Float[Array, "*B D"]:
    """Return x · W, summed over the rows of W; `w`, N and `rows` are those of `column_matmul`."""
    x, w = as_array("x", x), as_array("w", w)
    height, columns = matrix_sizes("w", w, pattern)
    check_operand("x", x, height, w.dtype)
    copies = _check_rows((w,), None if rows is None else (rows,), pattern)
    backend = _choose(implementation, x, columns, pattern)
    if _is_empty(x, pattern):
        return jnp.zeros((*x.shape[:-1], columns), x.dtype)
    return unflatten(vjp.row(backend, (flatten(x),), (w,), pattern, copies), x)


def sampled_matmul(
    a: Float[Array, "*B N"],
    c: Float[Array, "*B D"],
    pattern: Pattern,
    *,
    implementation: str | None = None,
) -> Array:
    """Return aᵀ · c at the blocks of the pattern: the weight gradient of both other products.

    The result is `[nonzero, block, block]` with a `BlockMask`, and `[N, D]` with kept rows.
    """
    a, c = as_array("a", a), as_array("c", c)
    if a.shape[:-1] != c.shape[:-1] or not a.ndim or not c.ndim:
        raise ValueError(f"c: {list(c.shape)}, expected the leading axes of a, {list(a.shape)}")
    shape: tuple[int, ...]
    if isinstance(pattern, BlockMask):
        rows, columns = (count * pattern.block for count in pattern.shape)
        shape = pattern.nonzero, pattern.block, pattern.block
    else:
        rows, columns = shape = pattern.kept, c.shape[-1]
    check_operand("a", a, rows, c.dtype)
    check_operand("c", c, columns, a.dtype)
    backend = _choose(implementation, a, columns, pattern)
    if _is_empty(a, pattern):
        return jnp.zeros(shape, a.dtype)
    return vjp.sampled(backend, flatten(a), flatten(c), pattern)


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
    """Return (silu(x · Gᵀ) · (x · Uᵀ)) · W of matrices G, U and W (`down`) with the same pattern.

    Shapes and `rows` are those of `column_matmul`, for each matrix. x is the only residual: the
    backward pass recomputes the first two products. Forward and backward pass compute 11 products,
    also under `jax.checkpoint`. The Pallas kernels do not write the first two products to memory.
    """
    arguments = {"x": x, "gate": gate, "up": up, "down": down}
    x, gate, up, down = (as_array(name, value) for name, value in arguments.items())
    _, columns = matrix_sizes("gate", gate, pattern)
    for name, w in (("up", up), ("down", down)):
        if w.shape != gate.shape or w.dtype != gate.dtype:
            raise ValueError(
                f"{name}: {w.dtype}{list(w.shape)}, expected that of gate,"
                f" {gate.dtype}{list(gate.shape)}"
            )
    check_operand("x", x, columns, gate.dtype)
    ws = gate, up, down
    copies = _check_rows(ws, rows, pattern)
    backend = _choose(implementation, x, columns, pattern)
    if _is_empty(x, pattern):
        return jnp.zeros_like(x)
    return unflatten(vjp.swiglu_mlp(backend, flatten(x), ws, pattern, copies), x)


def matrix_sizes(name: str, w: Array, pattern: Pattern) -> tuple[int, int]:
    """Return the kept rows and the columns of a matrix; raises if it does not fit the pattern."""
    if not isinstance(pattern, KeptRows | BlockMask):
        raise TypeError(f"pattern: {type(pattern).__name__}, expected KeptRows or a BlockMask")
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
            f"ids: {pattern.ids.shape[0]} blocks of {block} rows, but {name} has {w.shape[0]} rows"
        )
    check_ids(pattern, w.shape[0] // block)
    return pattern.kept, w.shape[1]


def _check_rows(
    ws: tuple[Array, ...], rows: tuple[Array, ...] | None, pattern: Pattern
) -> tuple[Array, ...] | None:
    """Return `rows`; raises if they are not the kept rows of the matrices."""
    if rows is None:
        return None
    if isinstance(pattern, BlockMask):
        raise ValueError("rows: accepted with kept rows, not with a BlockMask")
    if len(rows) != len(ws):
        raise ValueError(
            f"rows: {len(rows)} matrices, expected {len(ws)}, one for each of gate, up and down"
        )
    for w, copy in zip(ws, rows, strict=True):
        if copy.shape != (pattern.kept, w.shape[1]) or copy.dtype != w.dtype:
            raise ValueError(
                f"rows: {copy.dtype}{list(copy.shape)}, expected the kept rows,"
                f" {w.dtype}{[pattern.kept, w.shape[1]]}"
            )
    return rows


def check_operand(name: str, x: Array, width: int, dtype: jnp.dtype) -> None:
    """Raise if an operand does not have `width` columns, or not the float dtype of the other."""
    if x.ndim < 1 or x.shape[-1] != width:
        raise ValueError(f"{name}: shape {list(x.shape)}, expected [..., {width}]")
    if x.dtype != dtype or not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(
            f"{name}: {x.dtype}, and the other operand is {dtype}; expected one float dtype"
        )


def _choose(implementation: str | None, x: Array, columns: int, pattern: Pattern) -> str:
    return choose(implementation, x.dtype, columns, pattern.block)


def _is_empty(x: Array, pattern: Pattern) -> bool:
    blocks = pattern.ids.shape[0] if isinstance(pattern, KeptRows) else pattern.nonzero
    return not blocks or not math.prod(x.shape)


def flatten(x: Float[Array, "*B N"]) -> Float[Array, "T N"]:
    """Return an array with one leading axis."""
    return x.reshape(-1, x.shape[-1])


def unflatten(y: Float[Array, "T N"], x: Float[Array, "*B M"]) -> Float[Array, "*B N"]:
    """Return an array with the leading axes of x."""
    return y.reshape(*x.shape[:-1], y.shape[-1])
