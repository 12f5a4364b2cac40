"""Pallas kernels for TPU. The grid has an axis of token tiles and one of `tiled.Steps`.

The tile indices of the steps are prefetched scalars.

On other platforms the same program runs in interpret mode.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from kernels.block_sparse_matmul.patterns import BlockMask
from kernels.block_sparse_matmul.tiled import Product, Steps, largest_tile, split
from kernels.block_sparse_matmul.tiles import TpuTiles, UnsupportedTiles
from kernels.tpu import VMEM_BYTES, compiled_on_tpu, dot

NAME = "pallas_tpu"
_SUBLANES = 16


def refusal(dtype: jnp.dtype, width: int, block: int) -> str | None:
    """See `backends.Backend`. Interpret mode has the same restrictions as the TPU."""
    if dtype not in (jnp.float32, jnp.bfloat16):
        return f"{dtype} operands, accepted float32 and bfloat16"
    if block not in (128, 256, 512):
        return f"blocks of {block}, accepted 128, 256 and 512"
    longest = TpuTiles().row_bytes // dtype.itemsize
    if width % 128 and width > longest:
        return f"rows of {width}, accepted multiples of 128, and any width up to {longest}"
    return None


def reduction_tile(size: int, dtype: jnp.dtype, tiles: TpuTiles) -> int:
    """See `tiled.Kernels`. A row that cannot be divided is one tile, whatever `tiles` says.

    `refusal` limits the size of such a row.
    """
    longest = tiles.row_bytes // jnp.dtype(dtype).itemsize
    return size if size <= longest else largest_tile(size, 128, longest) or size


result_tile = reduction_tile


def contract(product: Product, tiles: TpuTiles) -> tuple[Float[Array, "T N"], ...]:
    """See `tiled.Product`."""
    tokens, dtype = product.xs[0].shape[0], product.xs[0].dtype
    tile_m = _token_tile(tokens, dtype, tiles.token_bytes)
    w_tile = (product.tile_k, product.tile_n)
    x_spec = _spec((tile_m, product.tile_k), lambda m, n, steps: (m, steps.reduction[n]))
    w_spec = _spec(
        w_tile[::-1] if product.transposed else w_tile,
        lambda _, n, steps: (steps.row[n], steps.column[n]),
    )
    y_spec = _spec((tile_m, product.tile_n), lambda m, n, steps: (m, steps.result[n]))
    call = _call(
        functools.partial(_contract, product=product),
        product.name,
        grid=(pl.cdiv(tokens, tile_m), product.steps.result.shape[0]),
        in_specs=[
            *[x_spec] * len(product.xs),
            *[w_spec] * len(product.ws),
            *[y_spec] * len(product.extras),
        ],
        out_specs=[y_spec] * product.outputs,
        sums=[pltpu.VMEM((tile_m, product.tile_n), jnp.float32)] * product.sums,
        out_shape=[jax.ShapeDtypeStruct((tokens, product.width), dtype)] * product.outputs,
    )
    return tuple(call(*product.steps, *product.xs, *product.ws, *product.extras))


def _contract(*refs: Any, product: Product) -> None:
    indices, xs, ws, extras, outputs, sums = split(
        refs,
        len(Steps._fields),
        *(len(product.xs), len(product.ws), len(product.extras), product.outputs, product.sums),
    )
    steps = Steps(*indices)
    n, end = pl.program_id(1), pl.num_programs(1) - 1
    result = steps.result

    @pl.when((n == 0) | (result[jnp.maximum(n - 1, 0)] != result[n]))
    def _() -> None:
        for total in sums:
            total[...] = jnp.zeros_like(total)

    @pl.when(steps.valid[n] > 0)
    def _() -> None:
        for i, w in enumerate(ws):
            x, total = xs[i % len(xs)], sums[i % len(sums)]
            total[...] += dot(x[...], w[...], 1, 1 if product.transposed else 0)

    @pl.when((n == end) | (result[jnp.minimum(n + 1, end)] != result[n]))
    def _() -> None:
        tiles = (extra[...].astype(jnp.float32) for extra in extras)
        results = product.finish(*(total[...] for total in sums), *tiles)
        for output, values in zip(outputs, results, strict=True):
            output[...] = values.astype(output.dtype)


def sample(
    a: Float[Array, "T N"], c: Float[Array, "T D"], mask: BlockMask, tiles: TpuTiles
) -> Float[Array, "nonzero b b"]:
    """See `tiled.Kernels`."""
    tokens, block = a.shape[0], mask.block
    tile_m = _token_tile(tokens, a.dtype, tiles.sampled_bytes)
    slots = jnp.arange(mask.nonzero, dtype=jnp.int32)
    steps = Steps(mask.rows, mask.columns, slots, jnp.zeros_like(slots), jnp.ones_like(slots))
    call = _call(
        functools.partial(_sample, tokens=tokens),
        "sampled",
        grid=(mask.nonzero, pl.cdiv(tokens, tile_m)),
        in_specs=[
            _spec((tile_m, block), lambda n, t, steps: (t, steps.result[n])),
            _spec((tile_m, block), lambda n, t, steps: (t, steps.reduction[n])),
        ],
        out_specs=_spec((block, block), lambda n, _, steps: (steps.row[n], steps.column[n])),
        sums=[pltpu.VMEM((block, block), jnp.float32)],
        out_shape=jax.ShapeDtypeStruct((mask.nonzero * block, block), a.dtype),
    )
    return call(*steps, a, c).reshape(-1, block, block)


def _sample(*refs: Any, tokens: int) -> None:
    a, c, output, total = refs[len(Steps._fields) :]
    t, tile_m = pl.program_id(1), a.shape[0]

    @pl.when(t == 0)
    def _() -> None:
        total[...] = jnp.zeros_like(total)

    # Rows after the last token are undefined, possibly NaN.
    valid = jax.lax.broadcasted_iota(jnp.int32, a.shape, 0) < tokens - t * tile_m
    valid_a, valid_c = (jnp.where(valid, tile[...], 0) for tile in (a, c))
    total[...] += dot(valid_a, valid_c, 0, 0)

    @pl.when(t == pl.num_programs(1) - 1)
    def _() -> None:
        output[...] = total[...].astype(output.dtype)


def _token_tile(tokens: int, dtype: jnp.dtype, max_bytes: int) -> int:
    return min(max_bytes // dtype.itemsize, -(-tokens // _SUBLANES) * _SUBLANES)


def _spec(tile: tuple[int, int], index: Callable[..., tuple[Any, Any]]) -> pl.BlockSpec:
    """Return a block spec. `index` maps the two grid indices and the steps to tile indices."""
    return pl.BlockSpec(tile, lambda i, j, *steps: index(i, j, Steps(*steps)))


def _call(
    kernel: Callable[..., None],
    name: str,
    *,
    grid: tuple[int, int],
    in_specs: Sequence[pl.BlockSpec],
    out_specs: Any,
    sums: Sequence[Any],
    out_shape: Any,
) -> Callable[..., Any]:
    _check_memory(in_specs, out_specs, sums, out_shape)

    def call(*arguments: Array, interpret: bool) -> Any:
        return pl.pallas_call(
            kernel,
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=len(Steps._fields),
                grid=grid,
                in_specs=in_specs,
                out_specs=out_specs,
                scratch_shapes=sums,
            ),
            out_shape=out_shape,
            interpret=interpret,
            name=name,
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=VMEM_BYTES
            ),
        )(*arguments)

    return compiled_on_tpu(call)


def _check_memory(
    in_specs: Sequence[pl.BlockSpec], out_specs: Any, sums: Sequence[Any], out_shape: Any
) -> None:
    """Raise `UnsupportedTiles` if the tiles exceed VMEM. Operands are double-buffered."""
    size = jax.tree.leaves(out_shape)[0].dtype.itemsize
    specs = [*in_specs, *jax.tree.leaves(out_specs)]
    tiles = sum(2 * size * math.prod(spec.block_shape) for spec in specs)
    needed = tiles + sum(4 * math.prod(total.shape) for total in sums)
    if needed > VMEM_BYTES:
        raise UnsupportedTiles(f"tiles of {needed} bytes of VMEM, accepted {VMEM_BYTES}")
