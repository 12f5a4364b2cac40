"""Gradients, in reverse mode. Each is made of the operations themselves, so that it can be
differentiated again.

`backend` is the name of an implementation, `pattern` whatever the operations take; of its integers
there is no gradient. The gradient of weights `[F, D]` of which some rows are kept is `[F, D]`, zero
elsewhere; or, where `rows` are given, which are these kept rows once more, `[kept, D]` and theirs:
nothing of the size of F is made, and it cannot be differentiated again.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from kernels.block_sparse_matmul.backends import BACKENDS
from kernels.block_sparse_matmul.patterns import KeptRows, Pattern

Rows = tuple[Array, ...] | None

_differentiable = functools.partial(jax.custom_vjp, nondiff_argnums=(0,))


@_differentiable
def column(backend: str, x: Array, w: Array, pattern: Pattern, rows: Rows) -> Array:
    """x · Wᵀ."""
    del rows
    return BACKENDS[backend].column(x, w, pattern)


def _column_forward(backend: str, x: Array, w: Array, pattern: Pattern, rows: Rows) -> Any:
    return column(backend, x, w, pattern, rows), (x, w, pattern, _given(rows))


def _column_backward(backend: str, kept: Any, dy: Array) -> Any:
    x, w, pattern, given = kept
    x, dy = _last((x, dy), given)
    dx = row(backend, (dy,), (w,), pattern, None)
    (dw,), drows = _of_weights(backend, ((dy, x, w),), pattern, given)
    return dx, dw, None, drows


column.defvjp(_column_forward, _column_backward)


@_differentiable
def row(
    backend: str, xs: tuple[Array, ...], ws: tuple[Array, ...], pattern: Pattern, rows: Rows
) -> Array:
    """Σ of x · W over pairs."""
    del rows
    return BACKENDS[backend].row(xs, ws, pattern)


def _row_forward(
    backend: str, xs: tuple[Array, ...], ws: tuple[Array, ...], pattern: Pattern, rows: Rows
) -> Any:
    return row(backend, xs, ws, pattern, rows), (xs, ws, pattern, _given(rows))


def _row_backward(backend: str, kept: Any, dy: Array) -> Any:
    xs, ws, pattern, given = kept
    xs, dy = _last((xs, dy), given)
    dxs = tuple(column(backend, dy, w, pattern, None) for w in ws)
    triples = tuple((x, dy, w) for x, w in zip(xs, ws, strict=True))
    dws, drows = _of_weights(backend, triples, pattern, given)
    return dxs, dws, None, drows


row.defvjp(_row_forward, _row_backward)


@_differentiable
def sampled(backend: str, a: Array, c: Array, pattern: Pattern, into: Array | None) -> Array:
    """aᵀ · c where the pattern has blocks."""
    return BACKENDS[backend].sampled(a, c, pattern, into)


def _sampled_forward(backend: str, a: Array, c: Array, pattern: Pattern, into: Array | None) -> Any:
    return sampled(backend, a, c, pattern, into), (a, c, pattern, into is not None)


def _sampled_backward(backend: str, kept: Any, ds: Array) -> Any:
    a, c, pattern, inside = kept
    if isinstance(pattern, KeptRows) and not inside:
        return (c @ ds.T).astype(a.dtype), (a @ ds).astype(c.dtype), None, None
    factors = ds.astype(a.dtype)
    da = column(backend, c, factors, pattern, None)
    dc = row(backend, (a,), (factors,), pattern, None)
    if not inside:
        return da, dc, None, None
    blocks = ds.reshape(-1, pattern.block, ds.shape[1])
    return da, dc, None, blocks.at[pattern.ids].set(0).reshape(ds.shape)


sampled.defvjp(_sampled_forward, _sampled_backward)


@_differentiable
def swiglu_mlp(
    backend: str, x: Array, ws: tuple[Array, ...], pattern: Pattern, rows: Rows
) -> Array:
    """(silu(x · Gᵀ) · (x · Uᵀ)) · W, of G, U and W. Of all that is computed nothing is kept: the
    backward pass needs x alone."""
    del rows
    gate, up, down = ws
    h = BACKENDS[backend].swiglu(x, gate, up, pattern)
    return BACKENDS[backend].row((h,), (down,), pattern)


def _mlp_forward(
    backend: str, x: Array, ws: tuple[Array, ...], pattern: Pattern, rows: Rows
) -> Any:
    return swiglu_mlp(backend, x, ws, pattern, rows), (x, ws, pattern, _given(rows))


def _mlp_backward(backend: str, kept: Any, dy: Array) -> Any:
    x, ws, pattern, given = kept
    gate, up, down = ws
    x, dy = _last((x, dy), given)
    dh = column(backend, dy, down, pattern, None)
    dg, du, h = _swiglu_gradients(backend, x, gate, up, dh, pattern)
    dx = row(backend, (dg, du), (gate, up), pattern, None)
    triples = ((dg, x, gate), (du, x, up), (h, dy, down))
    dws, drows = _of_weights(backend, triples, pattern, given)
    return dx, dws, None, drows


swiglu_mlp.defvjp(_mlp_forward, _mlp_backward)


@_differentiable
def _swiglu_gradients(
    backend: str, x: Array, gate: Array, up: Array, dh: Array, pattern: Pattern
) -> tuple[Array, Array, Array]:
    """The gradients of x · Gᵀ and x · Uᵀ, and what SwiGLU makes of them."""
    return BACKENDS[backend].swiglu_gradients(x, gate, up, dh, pattern)


def _gradients_forward(backend: str, *operands: Any) -> Any:
    return _swiglu_gradients(backend, *operands), operands


def _gradients_backward(backend: str, kept: Any, cotangents: tuple[Array, ...]) -> Any:
    """Not fused: second derivatives are for studies, and take the memory that they need."""
    x, gate, up, dh, pattern = kept
    wide = [column(backend, x, w, pattern, None) for w in (gate, up)]
    _, back = jax.vjp(_activated, *(a.astype(jnp.float32) for a in (*wide, dh)))
    found = back(tuple(a.astype(jnp.float32) for a in cotangents))
    dg, du, ddh = (a.astype(x.dtype) for a in found)
    dx = row(backend, (dg, du), (gate, up), pattern, None)
    dws, _ = _of_weights(backend, ((dg, x, gate), (du, x, up)), pattern, None)
    return dx, *dws, ddh, None


def _activated(g: Array, u: Array, dh: Array) -> tuple[Array, Array, Array]:
    h, back = jax.vjp(lambda g, u: jax.nn.silu(g) * u, g, u)
    dg, du = back(dh)
    return dg, du, h


_swiglu_gradients.defvjp(_gradients_forward, _gradients_backward)


def _given(rows: Rows) -> tuple[()] | None:
    """Whether there are rows, as what a backward pass may keep: their values would be a copy."""
    return None if rows is None else ()


def _of_weights(
    backend: str,
    triples: tuple[tuple[Array, Array, Array], ...],
    pattern: Pattern,
    given: tuple[()] | None,
) -> tuple[tuple[Array | None, ...], Rows]:
    """Of each (a, c, w) the gradient aᵀ · c of w, and of its rows: one of both is None."""
    whole = isinstance(pattern, KeptRows) and given is None
    found = tuple(
        sampled(backend, a, c, pattern, jnp.zeros_like(w) if whole else None).astype(w.dtype)
        for a, c, w in triples
    )
    return (found, None) if given is None else ((None,) * len(triples), found)


def _last(values: Any, given: tuple[()] | None) -> Any:
    return values if given is None else jax.tree.map(_never_again, values)


@jax.custom_jvp
def _never_again(x: Array) -> Array:
    """x, which refuses to be differentiated: `rows` would be forgotten."""
    return x


@_never_again.defjvp
def _refuse(_primals: Any, _tangents: Any) -> Any:
    raise TypeError("rows: gradients of kept rows cannot be differentiated again; accepted: None")
