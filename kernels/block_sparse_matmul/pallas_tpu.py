"""The loops for TPU: the grid walks over steps, whose tiles' places are scalars fetched ahead.

On any other platform the same program is interpreted.
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
from kernels.block_sparse_matmul.tiles import Misfit, TpuTiles

NAME = "pallas_tpu"
_VMEM = 64 * 2**20
_SUBLANES = 16


def refusal(dtype: jnp.dtype, width: int, block: int) -> str | None:
    """See `backends.Backend`. The rules are the chip's; the interpreter keeps them too."""
    if dtype not in (jnp.float32, jnp.bfloat16):
        return f"{dtype} operands, accepted float32 and bfloat16"
    if block not in (128, 256, 512):
        return f"blocks of {block}, accepted 128, 256 and 512"
    longest = TpuTiles().row // dtype.itemsize
    if width % 128 and width > longest:
        return f"rows of {width}, accepted multiples of 128, and up to {longest} anything"
    return None


def factor_tile(size: int, dtype: jnp.dtype, tiles: TpuTiles) -> int:
    """See `tiled.Loops`. A row that cannot be cut is a tile, which `refusal` allows by the default
    settings, whatever these are."""
    longest = tiles.row // jnp.dtype(dtype).itemsize
    return size if size <= longest else largest_tile(size, 128, longest) or size


result_tile = factor_tile


def contract(product: Product, tiles: TpuTiles) -> tuple[Float[Array, "T N"], ...]:
    """See `tiled.Product`."""
    tokens, dtype = product.xs[0].shape[0], product.xs[0].dtype
    tall = _tall(tokens, dtype, tiles.tokens)
    w_tile = (product.factor, product.result)
    x_spec = _spec((tall, product.factor), lambda m, n, steps: (m, steps.factor[n]))
    w_spec = _spec(
        w_tile[::-1] if product.transposed else w_tile,
        lambda _, n, steps: (steps.row[n], steps.column[n]),
    )
    y_spec = _spec((tall, product.result), lambda m, n, steps: (m, steps.result[n]))
    call = _call(
        functools.partial(_contract, product=product),
        product.name,
        grid=(pl.cdiv(tokens, tall), product.steps.result.shape[0]),
        in_specs=[
            *[x_spec] * len(product.xs),
            *[w_spec] * len(product.ws),
            *[y_spec] * len(product.extras),
        ],
        out_specs=[y_spec] * product.outputs,
        sums=[pltpu.VMEM((tall, product.result), jnp.float32)] * product.sums,
        out_shape=[jax.ShapeDtypeStruct((tokens, product.width), dtype)] * product.outputs,
    )
    return tuple(call(*product.steps, *product.xs, *product.ws, *product.extras))


def _contract(*refs: Any, product: Product) -> None:
    places, xs, ws, extras, outputs, sums = split(
        refs,
        len(Steps._fields),
        *(len(product.xs), len(product.ws), len(product.extras), product.outputs, product.sums),
    )
    steps = Steps(*places)
    n, end = pl.program_id(1), pl.num_programs(1) - 1
    result = steps.result

    @pl.when((n == 0) | (result[jnp.maximum(n - 1, 0)] != result[n]))
    def _() -> None:
        for total in sums:
            total[...] = jnp.zeros_like(total)

    @pl.when(steps.live[n] > 0)
    def _() -> None:
        for i, w in enumerate(ws):
            x, total = xs[i % len(xs)], sums[i % len(sums)]
            total[...] += _dot(x[...], w[...], 1, 1 if product.transposed else 0)

    @pl.when((n == end) | (result[jnp.minimum(n + 1, end)] != result[n]))
    def _() -> None:
        tiles = (extra[...].astype(jnp.float32) for extra in extras)
        results = product.finish(*(total[...] for total in sums), *tiles)
        for output, values in zip(outputs, results, strict=True):
            output[...] = values.astype(output.dtype)


def sample(
    a: Float[Array, "T N"], c: Float[Array, "T D"], mask: BlockMask, tiles: TpuTiles
) -> Float[Array, "nonzero b b"]:
    """See `tiled.Loops`."""
    tokens, block = a.shape[0], mask.block
    tall = _tall(tokens, a.dtype, tiles.sampled)
    slots = jnp.arange(mask.nonzero, dtype=jnp.int32)
    steps = Steps(mask.rows, mask.columns, slots, jnp.zeros_like(slots), jnp.ones_like(slots))
    call = _call(
        functools.partial(_sample, tokens=tokens),
        "sampled",
        grid=(mask.nonzero, pl.cdiv(tokens, tall)),
        in_specs=[
            _spec((tall, block), lambda n, t, steps: (t, steps.result[n])),
            _spec((tall, block), lambda n, t, steps: (t, steps.factor[n])),
        ],
        out_specs=_spec((block, block), lambda n, _, steps: (steps.row[n], steps.column[n])),
        sums=[pltpu.VMEM((block, block), jnp.float32)],
        out_shape=jax.ShapeDtypeStruct((mask.nonzero * block, block), a.dtype),
    )
    return call(*steps, a, c).reshape(-1, block, block)


def _sample(*refs: Any, tokens: int) -> None:
    a, c, output, total = refs[len(Steps._fields) :]
    t, tall = pl.program_id(1), a.shape[0]

    @pl.when(t == 0)
    def _() -> None:
        total[...] = jnp.zeros_like(total)

    # What lies beyond the last token is anything, NaN too.
    inside = jax.lax.broadcasted_iota(jnp.int32, a.shape, 0) < tokens - t * tall
    known_a, known_c = (jnp.where(inside, tile[...], 0) for tile in (a, c))
    total[...] += _dot(known_a, known_c, 0, 0)

    @pl.when(t == pl.num_programs(1) - 1)
    def _() -> None:
        output[...] = total[...].astype(output.dtype)


def _tall(tokens: int, dtype: jnp.dtype, most_bytes: int) -> int:
    return min(most_bytes // dtype.itemsize, -(-tokens // _SUBLANES) * _SUBLANES)


def _dot(a: Array, b: Array, a_axis: int, b_axis: int) -> Array:
    """Their product over one axis of each, exact products of float32 included."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    axes = (((a_axis,), (b_axis,)), ((), ()))
    return jax.lax.dot_general(a, b, axes, precision, jnp.float32)


def _spec(tile: tuple[int, int], place: Callable[..., tuple[Any, Any]]) -> pl.BlockSpec:
    """A tile whose place is a function of the grid's two indices and the steps."""
    return pl.BlockSpec(tile, lambda i, j, *steps: place(i, j, Steps(*steps)))


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
                dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=_VMEM
            ),
        )(*arguments)

    compiled, interpreted = (functools.partial(call, interpret=i) for i in (False, True))
    return lambda *arguments: jax.lax.platform_dependent(
        *arguments, tpu=compiled, default=interpreted
    )


def _check_memory(
    in_specs: Sequence[pl.BlockSpec], out_specs: Any, sums: Sequence[Any], out_shape: Any
) -> None:
    """Each operand's tile is there twice, one of them on its way."""
    size = jax.tree.leaves(out_shape)[0].dtype.itemsize
    specs = [*in_specs, *jax.tree.leaves(out_specs)]
    tiles = sum(2 * size * math.prod(spec.block_shape) for spec in specs)
    needed = tiles + sum(4 * math.prod(total.shape) for total in sums)
    if needed > _VMEM:
        raise Misfit(f"tiles of {needed} bytes of VMEM, accepted {_VMEM}")
