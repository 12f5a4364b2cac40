"""Products at the sizes that matter, by shape alone: to be lowered, compiled and measured."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kernels.block_sparse_matmul.api import column_matmul, row_matmul, swiglu_mlp
from kernels.block_sparse_matmul.backends import Backend
from kernels.block_sparse_matmul.patterns import BlockMask, kept_rows


class Spec(NamedTuple):
    """An MLP `[neurons, width]` of a model, bfloat16, of which the share `density` takes part."""

    model: str
    width: int
    neurons: int
    tokens: int = 4096
    density: float = 0.5
    block: int = 128

    @property
    def kept(self) -> int:
        """Blocks of rows."""
        return round(self.density * self.neurons / self.block)

    def mask(self) -> BlockMask:
        """A random pattern of this density."""
        shape = self.neurons // self.block, self.width // self.block
        order = np.random.default_rng(0).permutation(shape[0] * shape[1]).reshape(shape)
        return BlockMask.of(order < self.density * order.size, self.block)


LLAMA_2 = (Spec("llama-2-7b", 4096, 11_008), Spec("llama-2-13b", 5120, 13_824))


class Program(NamedTuple):
    """A function and shapes of its arguments; a gradient's are of all floats among them.

    `flops` counts matrix products with what takes part, without what is computed again.
    """

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    flops: float
    block: int


def programs(spec: Spec, implementation: str | None) -> dict[str, Program]:
    """Each product forward, and an MLP and a masked product forward and backward."""
    by: Any = {"implementation": implementation}
    mask, block = spec.mask(), spec.block
    x, h = _floats(spec.tokens, spec.width), _floats(spec.tokens, spec.kept * block)
    w, ids = _floats(spec.neurons, spec.width), jax.ShapeDtypeStruct((spec.kept,), jnp.int32)
    blocks = _floats(mask.nonzero, block, block)
    one = 2.0 * spec.tokens * spec.width * spec.kept * block
    masked = 2.0 * spec.tokens * mask.nonzero * block**2

    def mlp(x: Any, gate: Any, up: Any, down: Any, ids: Any) -> Any:
        return swiglu_mlp(x, gate, up, down, kept_rows(ids, block), **by)

    return {
        "column": Program(
            lambda x, w, ids: column_matmul(x, w, kept_rows(ids, block), **by),
            (x, w, ids),
            one,
            block,
        ),
        "row": Program(
            lambda h, w, ids: row_matmul(h, w, kept_rows(ids, block), **by), (h, w, ids), one, block
        ),
        "mlp": Program(mlp, (x, w, w, w, ids), 3 * one, block),
        "mlp, both ways": Program(
            lambda *a: _pulled(lambda x, g, u, d: mlp(x, g, u, d, a[4]), *a[:4]),
            (x, w, w, w, ids),
            9 * one,
            block,
        ),
        "mask": Program(
            lambda x, blocks: column_matmul(x, blocks, mask, **by), (x, blocks), masked, block
        ),
        "mask, both ways": Program(
            lambda x, blocks: _pulled(lambda x, b: column_matmul(x, b, mask, **by), x, blocks),
            (x, blocks),
            3 * masked,
            block,
        ),
    }


def operations(spec: Spec, backend: Backend) -> dict[tuple[str, str], Program]:
    """`tuned.OPERATIONS`: what an MLP with kept rows and a masked product do, each once."""
    mask, block = spec.mask(), spec.block
    x, h = _floats(spec.tokens, spec.width), _floats(spec.tokens, spec.kept * block)
    w, ids = _floats(spec.neurons, spec.width), jax.ShapeDtypeStruct((spec.kept,), jnp.int32)
    y, blocks = _floats(spec.tokens, spec.neurons), _floats(mask.nonzero, block, block)
    one = 2.0 * spec.tokens * spec.width * spec.kept * block
    masked = 2.0 * spec.tokens * mask.nonzero * block**2

    def rows(function: Callable[..., Any], products: int, *arguments: Any) -> Program:
        def call(*given: Any) -> Any:
            return function(*given[:-1], kept_rows(given[-1], block))

        return Program(call, (*arguments, ids), products * one, block)

    def masks(function: Callable[..., Any], *arguments: Any) -> Program:
        return Program(lambda *given: function(*given, mask), arguments, masked, block)

    def gradients(x: Any, dh: Any, gate: Any, up: Any, pattern: Any) -> Any:
        return backend.swiglu_gradients(x, gate, up, dh, pattern)

    def row(x: Any, w: Any, pattern: Any) -> Any:
        return backend.row((x,), (w,), pattern)

    def row_pairs(g: Any, u: Any, gate: Any, up: Any, pattern: Any) -> Any:
        return backend.row((g, u), (gate, up), pattern)

    return {
        ("rows", "column"): rows(backend.column, 1, x, w),
        ("rows", "row"): rows(row, 1, h, w),
        ("rows", "swiglu"): rows(backend.swiglu, 2, x, w, w),
        ("rows", "swiglu_gradients"): rows(gradients, 2, x, h, w, w),
        ("rows", "row_pairs"): rows(row_pairs, 2, h, h, w, w),
        ("mask", "column"): masks(backend.column, x, blocks),
        ("mask", "row"): masks(row, y, blocks),
        ("mask", "sampled"): masks(lambda a, c, p: backend.sampled(a, c, p, None), y, x),
    }


def dense(spec: Spec) -> dict[str, Program]:
    """The same by name with whole matrices, as XLA multiplies them."""
    x, h = _floats(spec.tokens, spec.width), _floats(spec.tokens, spec.neurons)
    w = _floats(spec.neurons, spec.width)
    one = 2.0 * spec.tokens * spec.width * spec.neurons

    def mlp(x: Any, gate: Any, up: Any, down: Any) -> Any:
        return (jax.nn.silu(x @ gate.T) * (x @ up.T)) @ down

    def column(x: Any, w: Any) -> Any:
        return x @ w.T

    both = functools.partial(_pulled, column)
    return {
        "column": Program(column, (x, w), one, spec.block),
        "row": Program(lambda h, w: h @ w, (h, w), one, spec.block),
        "mlp": Program(mlp, (x, w, w, w), 3 * one, spec.block),
        "mlp, both ways": Program(
            functools.partial(_pulled, mlp), (x, w, w, w), 9 * one, spec.block
        ),
        "mask": Program(column, (x, w), one, spec.block),
        "mask, both ways": Program(both, (x, w), 3 * one, spec.block),
    }


def _floats(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.bfloat16)


def _pulled(function: Callable[..., Any], *arguments: Any) -> tuple[Any, ...]:
    """The value, and gradients by a cotangent that depends on it, so that nothing is left out."""
    value, back = jax.vjp(function, *arguments)
    return (value, *back(jnp.sin(value)))
