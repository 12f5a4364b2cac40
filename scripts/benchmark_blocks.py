"""Block-sparse and dense products and MLPs, which `scripts.benchmark --only blocks` measures."""

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import kernels.block_sparse_matmul as block_sparse

WIDTH, NEURONS = 1024, 4096
COPIED_BYTES = 2**28  # larger than caches
Calls = dict[str, Callable[[], Any]]


class Case(NamedTuple):
    """Matrices `[NEURONS, WIDTH]` in square blocks, of which the share `density` is stored."""

    block: int
    density: float


CASES = [Case(block, density) for block in (128, 64) for density in (0.25, 0.125)]


def copy_call() -> Callable[[], Any]:
    """Return a call that reads an array of `COPIED_BYTES` and writes one."""
    x = jnp.zeros(COPIED_BYTES // 4, jnp.float32)
    call = jax.jit(lambda x: x + 1)
    return lambda: call(x)


def mlp_calls(tokens: int, case: Case) -> Calls:
    """Return a GELU MLP with all its gradients: dense, and with two block-sparse matrices."""
    mask, random = balanced_mask(case), np.random.default_rng(0)
    matrix, blocks = (NEURONS, WIDTH), (mask.nonzero, case.block, case.block)
    x, bias, *weights = _normal(random, (tokens, WIDTH), (NEURONS,), *[matrix] * 2, *[blocks] * 2)

    def dense_mlp(x: Any, up: Any, bias: Any, down: Any) -> Any:
        return jax.nn.gelu(x @ up.T + bias) @ down

    def sparse_mlp(x: Any, up: Any, bias: Any, down: Any, mask: block_sparse.BlockMask) -> Any:
        return block_sparse.gelu_mlp(x, up, bias, down, mask, mask, activation="gelu_new")

    dense_call, sparse_call = (jax.jit(_with_gradients(mlp)) for mlp in (dense_mlp, sparse_mlp))
    up, down, up_blocks, down_blocks = weights
    return {
        "dense": lambda: dense_call(x, up, bias, down),
        "sat_jax": lambda: sparse_call(x, up_blocks, bias, down_blocks, mask),
    }


def product_calls(tokens: int, case: Case) -> Calls:
    """Return x · Wᵀ of `[tokens, WIDTH]`: dense, and block-sparse in each library on a CPU."""
    import scipy.sparse
    import torch

    mask, random = balanced_mask(case), np.random.default_rng(0)
    x, w, blocks = _normal(
        random, (tokens, WIDTH), (NEURONS, WIDTH), (mask.nonzero, case.block, case.block)
    )
    starts = np.searchsorted(mask.rows, np.arange(mask.shape[0] + 1)).astype(np.int32)
    parts = np.array(blocks), np.array(mask.columns), starts
    scipy_w = scipy.sparse.bsr_array(parts, shape=(NEURONS, WIDTH))
    values, columns, starts = parts
    with warnings.catch_warnings():  # BSR is in beta
        warnings.simplefilter("ignore")
        torch_w = torch.sparse_bsr_tensor(
            *map(torch.tensor, (starts, columns, values)), size=(NEURONS, WIDTH)
        )
    torch_x, scipy_x = torch.tensor(np.array(x)).T.contiguous(), np.array(x).T.copy()
    dense_call = jax.jit(lambda x, w: x @ w.T)
    sparse_call = jax.jit(block_sparse.column_matmul)
    return {
        "dense": lambda: dense_call(x, w),
        "sat_jax": lambda: sparse_call(x, blocks, mask),
        "torch": lambda: torch_w @ torch_x,
        "scipy": lambda: scipy_w @ scipy_x,
    }


def balanced_mask(case: Case) -> block_sparse.BlockMask:
    """Return a random mask with the same number of blocks in each block row and block column."""
    random = np.random.default_rng(0)
    rows, columns = NEURONS // case.block, WIDTH // case.block
    shifts = random.permutation(columns)[: round(case.density * columns)]
    kept = np.zeros((rows, columns), bool)
    kept[np.arange(rows)[:, None], (np.arange(rows)[:, None] + shifts) % columns] = True
    return block_sparse.BlockMask.of(
        random.permutation(random.permutation(kept), axis=1), case.block
    )


def _with_gradients(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function of the value and the gradients of the first four arguments; the cotangent
    is the value."""

    def call(*arguments: Any) -> Any:
        operands, mask = arguments[:4], arguments[4:]
        value, vjp = jax.vjp(lambda *operands: function(*operands, *mask), *operands)
        return value, vjp(value)

    return call


def _normal(random: np.random.Generator, *shapes: tuple[int, ...]) -> list[jax.Array]:
    return [jnp.asarray(random.normal(size=shape) / 32, jnp.float32) for shape in shapes]
