"""Gradients, in reverse mode. Each is made of the operations themselves, so that it can be
differentiated again; that of SwiGLU is fused by the Pallas backends, and there it cannot.

`backend` is the name of an implementation, `pattern` whatever the operations take; of its integers
there is no gradient. The gradient of weights `[F, D]` of which some rows are kept is `[F, D]`, zero
elsewhere.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from kernels.block_sparse_matmul.backends import BACKENDS
from kernels.block_sparse_matmul.patterns import KeptRows, Pattern

_differentiable = functools.partial(jax.custom_vjp, nondiff_argnums=(0,))


@_differentiable
def column(backend: str, x: Array, w: Array, pattern: Pattern) -> Array:
    """x · Wᵀ."""
    return BACKENDS[backend].column(x, w, pattern)


def _column_forward(backend: str, x: Array, w: Array, pattern: Pattern) -> Any:
    return column(backend, x, w, pattern), (x, w, pattern)


def _column_backward(backend: str, kept: Any, dy: Array) -> Any:
    x, w, pattern = kept
    dx = row(backend, (dy,), (w,), pattern)
    return dx, _of_weights(backend, dy, x, w, pattern), None


column.defvjp(_column_forward, _column_backward)


@_differentiable
def row(backend: str, xs: tuple[Array, ...], ws: tuple[Array, ...], pattern: Pattern) -> Array:
    """Σ of x · W over pairs."""
    return BACKENDS[backend].row(xs, ws, pattern)


def _row_forward(
    backend: str, xs: tuple[Array, ...], ws: tuple[Array, ...], pattern: Pattern
) -> Any:
    return row(backend, xs, ws, pattern), (xs, ws, pattern)


def _row_backward(backend: str, kept: Any, dy: Array) -> Any:
    xs, ws, pattern = kept
    dxs = tuple(column(backend, dy, w, pattern) for w in ws)
    dws = tuple(_of_weights(backend, x, dy, w, pattern) for x, w in zip(xs, ws, strict=True))
    return dxs, dws, None


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
    da, dc = column(backend, c, factors, pattern), row(backend, (a,), (factors,), pattern)
    if not inside:
        return da, dc, None, None
    blocks = ds.reshape(-1, pattern.block, ds.shape[1])
    return da, dc, None, blocks.at[pattern.ids].set(0).reshape(ds.shape)


sampled.defvjp(_sampled_forward, _sampled_backward)


@_differentiable
def swiglu(backend: str, x: Array, gate: Array, up: Array, pattern: Pattern) -> Array:
    """silu(x · Gᵀ) · (x · Uᵀ)."""
    return BACKENDS[backend].swiglu(x, gate, up, pattern)


def _swiglu_forward(backend: str, x: Array, gate: Array, up: Array, pattern: Pattern) -> Any:
    return swiglu(backend, x, gate, up, pattern), (x, gate, up, pattern)


def _swiglu_backward(backend: str, kept: Any, dh: Array) -> Any:
    x, gate, up, pattern = kept
    dg, du = BACKENDS[backend].swiglu_gradients(x, gate, up, dh, pattern)
    dx = row(backend, (dg, du), (gate, up), pattern)
    dgate = _of_weights(backend, dg, x, gate, pattern)
    dup = _of_weights(backend, du, x, up, pattern)
    return dx, dgate, dup, None


swiglu.defvjp(_swiglu_forward, _swiglu_backward)


def _of_weights(backend: str, a: Array, c: Array, w: Array, pattern: Pattern) -> Array:
    into = jnp.zeros_like(w) if isinstance(pattern, KeptRows) else None
    return sampled(backend, a, c, pattern, into).astype(w.dtype)
