"""The loops for Hopper GPUs: a persistent grid, each block of threads taking tile after tile.

Tiles come into shared memory by TMA while others are multiplied by wgmma.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from kernels.block_sparse_matmul.patterns import BlockMask
from kernels.block_sparse_matmul.tiled import Product, finer, largest_tile

# One warpgroup holds 128 × 128 float32 sums in its registers, or two of 64 × 128.
_TALL = 128
_FACTOR = 64
_RESULT = 128
_UNIT = 64
_SHARED_BYTES = 160 * 1024  # for tiles on their way; results take up to 64 KiB of 227
_MOST_STAGES = 4
_SNAKE = 8  # tiles of tokens that are worked on side by side, so that L2 holds their x


def refusal(dtype: jnp.dtype, width: int, block: int) -> str | None:
    """See `backends.Backend`."""
    if dtype not in (jnp.bfloat16, jnp.float16):
        return f"{dtype} operands, accepted bfloat16 and float16"
    if block not in (64, 128):
        return f"blocks of {block}, accepted 64 and 128"
    if width % _UNIT:
        return f"rows of {width}, accepted multiples of {_UNIT}"
    return None


def factor_tile(size: int, _dtype: jnp.dtype) -> int:
    """See `tiled.Loops`."""
    return largest_tile(size, _UNIT, _FACTOR)


def result_tile(size: int, _dtype: jnp.dtype) -> int:
    """See `tiled.Loops`."""
    return largest_tile(size, _UNIT, _RESULT)


def contract(product: Product) -> tuple[Float[Array, "T N"], ...]:
    """See `tiled.Product`."""
    product = finer(product, _FACTOR)
    tokens, dtype = product.xs[0].shape[0], product.xs[0].dtype
    tall = _TALL // product.sums
    results = product.width // product.result
    # Padding is of no consequence: each token's results are its own.
    padded = -tokens % tall
    xs, extras = (
        [jnp.pad(part, ((0, padded), (0, 0))) if padded else part for part in parts]
        for parts in (product.xs, product.extras)
    )
    rows = tokens + padded
    kernel = _kernel(
        functools.partial(_contract, product=product, tall=tall),
        [jax.ShapeDtypeStruct((rows, product.width), dtype)] * product.outputs,
    )
    steps = product.steps
    # Steps that are not live are the only ones of their results.
    starts, counts = _runs(steps.result, steps.live, results)
    places = (starts, counts, steps.factor, steps.row, steps.column)
    found = kernel(*places, *xs, *product.ws, *extras)
    return tuple(y[:tokens] if padded else y for y in found)


def _contract(*refs: Any, product: Product, tall: int) -> None:
    starts, counts, factors, rows, columns = refs[:5]
    xs, ws, extras, outputs = _split(
        refs[5:], [len(product.xs), len(product.ws), len(product.extras), product.outputs]
    )
    dtype = xs[0].dtype
    tile = (tall, product.result)
    w_tile = (product.factor, product.result)
    if product.transposed:
        w_tile = w_tile[::-1]
    stages = _stages([(tall, product.factor)] * len(xs) + [w_tile] * len(ws), dtype)

    @plgpu.nd_loop(
        (outputs[0].shape[0] // tall * (product.width // product.result),), collective_axes="sm"
    )
    def _(loop: Any) -> None:
        (place,) = loop.index
        shape = (outputs[0].shape[0] // tall, product.width // product.result)
        m, n = plgpu.planar_snake(place, shape, 0, min(_SNAKE, shape[0]))
        start = starts[n]
        x_spec = _spec((tall, product.factor), dtype, lambda s: (m, factors[start + s]))
        w_spec = _spec(w_tile, dtype, lambda s: (rows[start + s], columns[start + s]))

        def multiply(*sums: Any) -> tuple[Array, ...]:
            def step(_: Any, *tiles: Any) -> None:
                x_tiles, w_tiles = tiles[: len(xs)], tiles[len(xs) :]
                for i, w in enumerate(w_tiles):
                    w = w.transpose((1, 0)) if product.transposed else w
                    plgpu.wgmma(sums[i % len(sums)], x_tiles[i % len(x_tiles)], w)
                plgpu.wgmma_wait(len(w_tiles))  # those of the step before

            pipeline = plgpu.emit_pipeline(
                step,
                grid=(counts[n],),
                in_specs=[x_spec] * len(xs) + [w_spec] * len(ws),
                max_concurrent_steps=stages,
            )
            pipeline(*xs, *ws)
            return tuple(total[...] for total in sums)

        totals = pl.run_scoped(multiply, *[plgpu.ACC(tile, jnp.float32)] * product.sums)
        _finish(product, totals, extras, outputs, (m, n))


def _finish(
    product: Product,
    totals: Sequence[Array],
    extras: Sequence[Any],
    outputs: Sequence[Any],
    place: tuple[Array, Array],
) -> None:
    """Makes the results of the sums and writes them."""
    tall, wide = tile = totals[0].shape[0], product.result
    m, n = place
    here = (pl.ds(m * tall, tall), pl.ds(n * wide, wide))
    dtype = outputs[0].dtype

    def write(loaded: Sequence[Any], stored: Sequence[Any], barrier: Any) -> None:
        for source, target in zip(extras, loaded, strict=True):
            plgpu.copy_gmem_to_smem(source.at[here], target, barrier)
            plgpu.barrier_wait(barrier)
        tiles = (extra[...].astype(jnp.float32) for extra in loaded)
        for values, target in zip(product.finish(*totals, *tiles), stored, strict=True):
            target[...] = values.astype(dtype)
        plgpu.commit_smem()
        for source, target in zip(stored, outputs, strict=True):
            plgpu.copy_smem_to_gmem(source, target.at[here])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    shared = plgpu.SMEM(tile, dtype, transforms=_transforms(tile, dtype))
    pl.run_scoped(
        write,
        [shared] * len(extras),
        [shared] * len(outputs),
        plgpu.Barrier(),
    )


def sample(
    a: Float[Array, "T N"], c: Float[Array, "T D"], mask: BlockMask
) -> Float[Array, "nonzero b b"]:
    """See `tiled.Loops`."""
    block = mask.block
    if padded := -a.shape[0] % _UNIT:
        a, c = (jnp.pad(part, ((0, padded), (0, 0))) for part in (a, c))
    kernel = _kernel(
        functools.partial(_sample, block=block),
        [jax.ShapeDtypeStruct((mask.nonzero * block, block), a.dtype)],
    )
    (found,) = kernel(mask.rows, mask.columns, a, c)
    return found.reshape(-1, block, block)


def _sample(rows: Any, columns: Any, a: Any, c: Any, output: Any, *, block: int) -> None:
    tile, dtype = (block, block), a.dtype
    stages = _stages([(_UNIT, block)] * 2, dtype)

    @plgpu.nd_loop((output.shape[0] // block,), collective_axes="sm")
    def _(loop: Any) -> None:
        (n,) = loop.index
        row, column = rows[n], columns[n]

        def multiply(total: Any) -> Array:
            def step(_: Any, a_tile: Any, c_tile: Any) -> None:
                plgpu.wgmma(total, a_tile.transpose((1, 0)), c_tile)
                plgpu.wgmma_wait(1)

            pipeline = plgpu.emit_pipeline(
                step,
                grid=(a.shape[0] // _UNIT,),
                in_specs=[
                    _spec((_UNIT, block), dtype, lambda t: (t, row)),
                    _spec((_UNIT, block), dtype, lambda t: (t, column)),
                ],
                max_concurrent_steps=stages,
            )
            pipeline(a, c)
            return total[...]

        total = pl.run_scoped(multiply, plgpu.ACC(tile, jnp.float32))

        def write(stored: Any) -> None:
            stored[...] = total.astype(dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(stored, output.at[pl.ds(n * block, block)])
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        pl.run_scoped(write, plgpu.SMEM(tile, dtype, transforms=_transforms(tile, dtype)))


def _runs(
    result: Int[Array, " n"], live: Int[Array, " n"], results: int
) -> tuple[Int[Array, " r"], Int[Array, " r"]]:
    """Of each result its first step and how many are live."""
    starts = jnp.searchsorted(result, jnp.arange(results, dtype=jnp.int32)).astype(jnp.int32)
    return starts, jax.ops.segment_sum(live, result, results, indices_are_sorted=True)


def _kernel(body: Callable[..., None], out: Sequence[jax.ShapeDtypeStruct]) -> Callable[..., Any]:
    return plgpu.kernel(
        body,
        out_type=list(out),
        grid=(_processors(),),
        grid_names=("sm",),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
    )


def _processors() -> int:
    """Streaming multiprocessors: of the mesh's device where one is set, else of the default one, or
    those of an H200."""
    if device := jax.sharding.get_abstract_mesh().abstract_device:
        return device.num_cores
    return getattr(jax.devices()[0], "core_count", None) or 132


def _stages(tiles: Sequence[tuple[int, int]], dtype: jnp.dtype) -> int:
    step = sum(map(math.prod, tiles)) * jnp.dtype(dtype).itemsize
    return max(2, min(_MOST_STAGES, _SHARED_BYTES // step))


def _spec(tile: tuple[int, int], dtype: jnp.dtype, place: Callable[..., Any]) -> plgpu.BlockSpec:
    """A tile that is given up one step later: until then wgmma may read it."""
    return plgpu.BlockSpec(tile, place, transforms=_transforms(tile, dtype), delay_release=1)


def _transforms(tile: tuple[int, int], dtype: jnp.dtype) -> tuple[Any, ...]:
    size = jnp.dtype(dtype).itemsize
    swizzle = plgpu.find_swizzle(tile[1] * size * 8)
    return plgpu.TilingTransform((8, swizzle // size)), plgpu.SwizzleTransform(swizzle)


def _split(refs: Sequence[Any], counts: Sequence[int]) -> list[Sequence[Any]]:
    parts = []
    for count in counts:
        parts.append(refs[:count])
        refs = refs[count:]
    return parts
