"""Reverse-mode gradients. Each consists of the operations themselves, and is differentiable again.

`backend` is the key of an implementation in `BACKENDS`. With kept rows, the gradient of weights
`[F, D]` is `[F, D]` and zero elsewhere. If `rows`, a copy of the kept rows `[kept, D]`, is given,
it gets the gradient instead: no array of the size of F is computed, and the gradient cannot be
differentiated again.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from kernels.block_sparse_matmul.backends import BACKENDS
from kernels.block_sparse_matmul.patterns import BlockMask, KeptRows, Pattern
from kernels.derivatives import refuse_derivatives

Rows = tuple[Array, ...] | None
# Whether `rows` are given, as a residual: () or None. A bool would become an array, and the rows
# themselves would be stored as a copy.
HasRows = tuple[()] | None

_differentiable = functools.partial(jax.custom_vjp, nondiff_argnums=(0,))


@_differentiable
def column(backend: str, x: Array, w: Array, pattern: Pattern, rows: Rows) -> Array:
    """x · Wᵀ."""
    del rows
    return BACKENDS[backend].column(x, w, pattern)


def _column_forward(backend: str, x: Array, w: Array, pattern: Pattern, rows: Rows) -> Any:
    return column(backend, x, w, pattern, rows), (x, w, pattern, _has_rows(rows))


def _column_backward(backend: str, residuals: Any, dy: Array) -> Any:
    x, w, pattern, has_rows = residuals
    x, dy = _guard((x, dy), has_rows)
    dx = row(backend, (dy,), (w,), pattern, None)
    (dw,), drows = _weight_gradients(backend, ((dy, x, w),), pattern, has_rows)
    return dx, dw, None, drows


column.defvjp(_column_forward, _column_backward)


@_differentiable
def row(
    backend: str, xs: tuple[Array, ...], ws: tuple[Array, ...], pattern: Pattern, rows: Rows
) -> Array:
    """Σ x · W over the pairs (x, W)."""
    del rows
    return BACKENDS[backend].row(xs, ws, pattern)


def _row_forward(
    backend: str, xs: tuple[Array, ...], ws: tuple[Array, ...], pattern: Pattern, rows: Rows
) -> Any:
    return row(backend, xs, ws, pattern, rows), (xs, ws, pattern, _has_rows(rows))


def _row_backward(backend: str, residuals: Any, dy: Array) -> Any:
    xs, ws, pattern, has_rows = residuals
    xs, dy = _guard((xs, dy), has_rows)
    dxs = tuple(column(backend, dy, w, pattern, None) for w in ws)
    factors = tuple((x, dy, w) for x, w in zip(xs, ws, strict=True))
    dws, drows = _weight_gradients(backend, factors, pattern, has_rows)
    return dxs, dws, None, drows


row.defvjp(_row_forward, _row_backward)


def sampled(backend: str, a: Array, c: Array, pattern: Pattern) -> Array:
    """aᵀ · c at the blocks of the pattern; with kept rows a dense product."""
    if isinstance(pattern, KeptRows):
        return jnp.matmul(a.T, c)
    return _sampled_by_mask(backend, a, c, pattern)


@_differentiable
def _sampled_by_mask(backend: str, a: Array, c: Array, mask: BlockMask) -> Array:
    return BACKENDS[backend].sampled(a, c, mask)


def _sampled_forward(backend: str, a: Array, c: Array, mask: BlockMask) -> Any:
    return _sampled_by_mask(backend, a, c, mask), (a, c, mask)


def _sampled_backward(backend: str, residuals: Any, ds: Array) -> Any:
    a, c, mask = residuals
    return column(backend, c, ds, mask, None), row(backend, (a,), (ds,), mask, None), None


_sampled_by_mask.defvjp(_sampled_forward, _sampled_backward)


@_differentiable
def swiglu_mlp(
    backend: str, x: Array, ws: tuple[Array, ...], pattern: Pattern, rows: Rows
) -> Array:
    """(silu(x · Gᵀ) · (x · Uᵀ)) · W of G, U and W. x is the only residual of activations."""
    del rows
    gate, up, down = ws
    h = BACKENDS[backend].swiglu(x, gate, up, pattern)
    return BACKENDS[backend].row((h,), (down,), pattern)


def _mlp_forward(
    backend: str, x: Array, ws: tuple[Array, ...], pattern: Pattern, rows: Rows
) -> Any:
    return swiglu_mlp(backend, x, ws, pattern, rows), (x, ws, pattern, _has_rows(rows))


def _mlp_backward(backend: str, residuals: Any, dy: Array) -> Any:
    x, ws, pattern, has_rows = residuals
    gate, up, down = ws
    x, dy = _guard((x, dy), has_rows)
    dh = column(backend, dy, down, pattern, None)
    dg, du, h = _swiglu_gradients(backend, x, gate, up, dh, pattern)
    dx = row(backend, (dg, du), (gate, up), pattern, None)
    factors = ((dg, x, gate), (du, x, up), (h, dy, down))
    dws, drows = _weight_gradients(backend, factors, pattern, has_rows)
    return dx, dws, None, drows


swiglu_mlp.defvjp(_mlp_forward, _mlp_backward)


@_differentiable
def _swiglu_gradients(
    backend: str, x: Array, gate: Array, up: Array, dh: Array, pattern: Pattern
) -> tuple[Array, Array, Array]:
    """Return the gradients of x · Gᵀ and x · Uᵀ, and the result of SwiGLU."""
    return BACKENDS[backend].swiglu_gradients(x, gate, up, dh, pattern)


def _gradients_forward(backend: str, *operands: Any) -> Any:
    return _swiglu_gradients(backend, *operands), operands


def _gradients_backward(backend: str, residuals: Any, cotangents: tuple[Array, ...]) -> Any:
    """Compute second derivatives. They are not fused and store every intermediate product."""
    x, gate, up, dh, pattern = residuals
    products = [column(backend, x, w, pattern, None) for w in (gate, up)]
    _, vjp = jax.vjp(_activate_gradients, *(a.astype(jnp.float32) for a in (*products, dh)))
    gradients = vjp(tuple(a.astype(jnp.float32) for a in cotangents))
    dg, du, ddh = (a.astype(x.dtype) for a in gradients)
    dx = row(backend, (dg, du), (gate, up), pattern, None)
    dws, _ = _weight_gradients(backend, ((dg, x, gate), (du, x, up)), pattern, None)
    return dx, *dws, ddh, None


def _activate_gradients(g: Array, u: Array, dh: Array) -> tuple[Array, Array, Array]:
    h, vjp = jax.vjp(lambda g, u: jax.nn.silu(g) * u, g, u)
    dg, du = vjp(dh)
    return dg, du, h


_swiglu_gradients.defvjp(_gradients_forward, _gradients_backward)


def _has_rows(rows: Rows) -> HasRows:
    return None if rows is None else ()


def _weight_gradients(
    backend: str,
    factors: tuple[tuple[Array, Array, Array], ...],
    pattern: Pattern,
    has_rows: HasRows,
) -> tuple[tuple[Array | None, ...], Rows]:
    """Return the gradients aᵀ · c for each (a, c, w), as those of the matrices or of their rows.

    The gradients of the others are None.
    """
    gradients = tuple(sampled(backend, a, c, pattern).astype(w.dtype) for a, c, w in factors)
    if has_rows is not None:
        return (None,) * len(factors), gradients
    if isinstance(pattern, KeptRows):
        pairs = zip(gradients, factors, strict=True)
        gradients = tuple(_expand(gradient, w, pattern) for gradient, (_, _, w) in pairs)
    return gradients, None


def _expand(rows: Array, w: Array, pattern: KeptRows) -> Array:
    """Return an array of the shape of w with the kept rows, and zeros elsewhere."""
    blocks = jnp.zeros_like(w).reshape(-1, pattern.block, w.shape[1])
    kept = rows.reshape(-1, *blocks.shape[1:])
    sorted_ids: Any = {"indices_are_sorted": True, "unique_indices": True}
    return blocks.at[pattern.ids].set(kept, **sorted_ids).reshape(w.shape)


def _guard(values: Any, has_rows: HasRows) -> Any:
    """Return `values`; with `rows`, their differentiation raises, since it would ignore `rows`."""
    reason = "rows: gradients of kept rows cannot be differentiated again; accepted: None"
    return values if has_rows is None else refuse_derivatives(values, reason)
