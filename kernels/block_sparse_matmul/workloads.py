"""Programs at the sizes of Llama-2, as argument shapes: to test, tune, benchmark and compile."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kernels.block_sparse_matmul.api import column_matmul, row_matmul, swiglu_mlp
from kernels.block_sparse_matmul.backends import Backend
from kernels.block_sparse_matmul.patterns import BlockMask, kept_rows
from kernels.program import Program, with_gradients


class Workload(NamedTuple):
    """The MLP of a model in bfloat16: matrices `[neurons, width]`, of which `density` is kept."""

    model: str
    width: int
    neurons: int
    tokens: int = 4096
    density: float = 0.5
    block: int = 128

    @property
    def kept(self) -> int:
        """Number of kept blocks of rows, at least one."""
        return max(1, round(self.density * self.neurons / self.block))

    def mask(self) -> BlockMask:
        """Return a random block mask of this density."""
        shape = self.neurons // self.block, self.width // self.block
        order = np.random.default_rng(0).permutation(shape[0] * shape[1]).reshape(shape)
        return BlockMask.of(order < self.density * order.size, self.block)


LLAMA_2 = (Workload("llama-2-7b", 4096, 11_008), Workload("llama-2-13b", 5120, 13_824))
MODELS = {workload.model: workload for workload in (*LLAMA_2, Workload("small", 256, 512))}


def programs(workload: Workload, implementation: str | None) -> dict[str, Program]:
    """Return the products, and an MLP and a masked product with all gradients, by name.

    `implementation`: as in `api`, or "dense" for XLA's products of the full matrices.
    """
    _, width, neurons, tokens, _, block = workload
    x, w, mask = _bfloat16(tokens, width), _bfloat16(neurons, width), workload.mask()
    if implementation == "dense":
        column, row, mlp, masked = _dense_column, _dense_row, _dense_mlp, _dense_column
        rows, values, stored = neurons, w, neurons * width
    else:
        column, row, mlp, masked = _sparse_products(mask, implementation)
        rows, values = workload.kept * block, _bfloat16(mask.nonzero, block, block)
        stored = mask.nonzero * block**2
    flops, masked_flops = 2.0 * tokens * width * rows, 2.0 * tokens * stored
    h, ids = _bfloat16(tokens, rows), () if implementation == "dense" else (_ids(workload),)
    weights = (w, w, w, *ids)
    return {
        "column": Program(column, (x, w, *ids), flops, block),
        "row": Program(row, (h, w, *ids), flops, block),
        "mlp": Program(mlp, (x, *weights), 3 * flops, block),
        "mlp_gradients": Program(with_gradients(mlp, 4), (x, *weights), 9 * flops, block),
        "mask": Program(masked, (x, values), masked_flops, block),
        "mask_gradients": Program(with_gradients(masked, 2), (x, values), 3 * masked_flops, block),
    }


def _sparse_products(
    mask: BlockMask, implementation: str | None
) -> tuple[Callable[..., Any], Callable[..., Any], Callable[..., Any], Callable[..., Any]]:
    """Return column, row and mlp, with ids as the last argument, and the masked product."""

    def by_ids(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *operands: function(
            *operands[:-1], kept_rows(operands[-1], mask.block), implementation=implementation
        )

    def masked(x: Any, values: Any) -> Any:
        return column_matmul(x, values, mask, implementation=implementation)

    return by_ids(column_matmul), by_ids(row_matmul), by_ids(swiglu_mlp), masked


def operations(workload: Workload, backend: Backend) -> dict[tuple[str, str], Program]:
    """Return a program for each of `tuned.OPERATIONS`, computed by `backend`."""
    mask, block, tokens = workload.mask(), workload.block, workload.tokens
    x, h = _bfloat16(tokens, workload.width), _bfloat16(tokens, workload.kept * block)
    w, ids = _bfloat16(workload.neurons, workload.width), _ids(workload)
    y, values = _bfloat16(tokens, workload.neurons), _bfloat16(mask.nonzero, block, block)
    flops = 2.0 * tokens * workload.width * workload.kept * block
    masked_flops = 2.0 * tokens * mask.nonzero * block**2

    def rows(function: Callable[..., Any], products: int, *arguments: Any) -> Program:
        def call(*operands: Any) -> Any:
            return function(*operands[:-1], kept_rows(operands[-1], block))

        return Program(call, (*arguments, ids), products * flops, block)

    def masked(function: Callable[..., Any], *arguments: Any) -> Program:
        return Program(lambda *a: function(*a, mask), arguments, masked_flops, block)

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
        ("mask", "column"): masked(backend.column, x, values),
        ("mask", "row"): masked(row, y, values),
        ("mask", "sampled"): masked(backend.sampled, y, x),
    }


def _dense_column(x: Any, w: Any) -> Any:
    return x @ w.T


def _dense_row(h: Any, w: Any) -> Any:
    return h @ w


def _dense_mlp(x: Any, gate: Any, up: Any, down: Any) -> Any:
    return (jax.nn.silu(x @ gate.T) * (x @ up.T)) @ down


def _ids(workload: Workload) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((workload.kept,), jnp.int32)


def _bfloat16(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.bfloat16)
