"""The kernels for Hopper GPUs: a persistent grid, in which each thread block computes many tiles.

TMA loads tiles into shared memory while wgmma multiplies earlier ones.
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
from kernels.block_sparse_matmul.tiled import Product, Steps, largest_tile, split, split_reduction
from kernels.block_sparse_matmul.tiles import GpuTiles, UnsupportedTiles

NAME = "pallas_gpu"
# Two warpgroups compute, each for its own tokens; a third one loads the tiles. The registers of a
# warpgroup hold 128 × 128 float32 sums, or two accumulators of 64 × 128.
_COMPUTE_WARPGROUPS = 2
_MAX_SUMS = 128 * 128
_UNIT = 64
_LOADER_REGISTERS = 40
# Buffers for results in shared memory, used in turn if there are more results. Inputs of
# `Product.finish` are loaded into the last buffers.
_RESULT_BUFFERS = 2
_SHARED_BYTES = 216 * 1024  # of the 227 KiB that a thread block can use


def refusal(dtype: jnp.dtype, width: int, block: int) -> str | None:
    """See `backends.Backend`."""
    if dtype not in (jnp.bfloat16, jnp.float16):
        return f"{dtype} operands, accepted bfloat16 and float16"
    if block not in (64, 128):
        return f"blocks of {block}, accepted 64 and 128"
    if width % _UNIT:
        return f"rows of {width}, accepted multiples of {_UNIT}"
    return None


def reduction_tile(size: int, _dtype: jnp.dtype, tiles: GpuTiles) -> int:
    """See `tiled.Kernels`."""
    return largest_tile(size, _UNIT, tiles.tile_k)


def result_tile(size: int, _dtype: jnp.dtype, tiles: GpuTiles) -> int:
    """See `tiled.Kernels`."""
    return largest_tile(size, _UNIT, tiles.tile_n)


def contract(product: Product, tiles: GpuTiles) -> tuple[Float[Array, "T N"], ...]:
    """See `tiled.Product`."""
    product = split_reduction(product, tiles.tile_k)
    tokens, dtype = product.xs[0].shape[0], product.xs[0].dtype
    # Two accumulators share the registers, and two pairs of operands share the shared memory.
    tile_m = tiles.tile_m // len(product.ws)
    if tile_m % _UNIT or product.sums * tile_m * product.tile_n > _MAX_SUMS:
        raise UnsupportedTiles(
            f"{product.sums} × {tile_m} × {product.tile_n} sums per warpgroup, accepted at most"
            f" {_MAX_SUMS}, and sizes that are multiples of {_UNIT}"
        )
    # Padding tokens do not change the results of other tokens.
    padding = -tokens % (tile_m * _COMPUTE_WARPGROUPS)
    xs, extras = (
        [jnp.pad(array, ((0, padding), (0, 0))) if padding else array for array in arrays]
        for arrays in (product.xs, product.extras)
    )
    kernel = _kernel(
        functools.partial(_contract, product=product, tile_m=tile_m, settings=tiles),
        [jax.ShapeDtypeStruct((tokens + padding, product.width), dtype)] * product.outputs,
        product.name,
        warpgroups=_COMPUTE_WARPGROUPS + 1,
    )
    steps = product.steps
    # A padding step is the only step of its result.
    ranges = () if product.uniform else _step_ranges(steps, product.width // product.tile_n)
    results = kernel(*ranges, steps.reduction, steps.row, steps.column, *xs, *product.ws, *extras)
    return tuple(y[:tokens] if padding else y for y in results)


def _contract(*refs: Any, product: Product, tile_m: int, settings: GpuTiles) -> None:
    ranges, (reductions, rows, columns), xs, ws, extras, outputs = split(
        refs,
        *(0 if product.uniform else 2, 3),
        *(len(product.xs), len(product.ws), len(product.extras), product.outputs),
    )
    dtype, tile = xs[0].dtype, (tile_m, product.tile_n)
    x_tile = (tile_m * _COMPUTE_WARPGROUPS, product.tile_k)
    w_tile = (product.tile_k, product.tile_n)
    if product.transposed:
        w_tile = w_tile[::-1]
    tiles = [x_tile] * len(xs) + [w_tile] * len(ws)
    buffers = min(len(outputs), _RESULT_BUFFERS)
    assert len(extras) < buffers
    stages = _stages(settings, tiles, [tile] * _COMPUTE_WARPGROUPS * buffers, dtype)
    shape = (outputs[0].shape[0] // x_tile[0], product.width // product.tile_n)

    def pipeline(m: Any, n: Any, step: Any = None, compute: Any = None) -> Any:
        """Return the pipeline over the steps of result tile n, for token tile m."""
        if product.uniform:
            count = product.steps.result.shape[0] // shape[1]
            start = n * count
        else:
            start, count = (part[n] for part in ranges)
        x_spec = _spec(x_tile, dtype, lambda s: (m, reductions[start + s]))
        w_spec = _spec(w_tile, dtype, lambda s: (rows[start + s], columns[start + s]))
        return plgpu.emit_pipeline_warp_specialized(
            step,
            grid=(count,),
            memory_registers=_LOADER_REGISTERS,
            in_specs=[x_spec] * len(xs) + [w_spec] * len(ws),
            max_concurrent_steps=stages,
            wg_axis="warpgroup",
            num_compute_wgs=_COMPUTE_WARPGROUPS,
            compute_context=compute,
        )

    def compute_tiles(allocations: Any, buffer_refs: Sequence[Any], barriers: Any) -> None:
        warpgroup = jax.lax.axis_index("warpgroup")
        own_tokens = pl.ds(warpgroup * tile_m, tile_m)

        def step(_: Any, *operands: Any) -> Any:
            *tiles, sums = operands
            x_tiles, w_tiles = tiles[: len(xs)], tiles[len(xs) :]
            for i, w in enumerate(w_tiles):
                w = w.transpose((1, 0)) if product.transposed else w
                plgpu.wgmma(sums[i % len(sums)], x_tiles[i % len(x_tiles)].at[own_tokens], w)
            plgpu.wgmma_wait(0)
            return sums

        @plgpu.nd_loop((shape[0] * shape[1],), collective_axes="sm")
        def _(loop: Any) -> None:
            width = min(settings.grid_tile_width, shape[0])
            m, n = plgpu.planar_snake(loop.index[0], shape, 0, width)
            window = (
                pl.ds((m * _COMPUTE_WARPGROUPS + warpgroup) * tile_m, tile_m),
                pl.ds(n * product.tile_n, product.tile_n),
            )

            def compute(run_pipeline: Any) -> None:
                def accumulate(*sums: Any) -> None:
                    run_pipeline(sums)
                    _finish(
                        product,
                        [total[...] for total in sums],
                        barriers.at[warpgroup],
                        [ref.at[window] for ref in extras],
                        [ref.at[window] for ref in outputs],
                        [ref.at[warpgroup] for ref in buffer_refs],
                    )

                pl.run_scoped(accumulate, *[plgpu.ACC(tile, jnp.float32)] * product.sums)

            pipeline(m, n, step, compute)(*xs, *ws, allocations=allocations)

        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    buffer = plgpu.SMEM((_COMPUTE_WARPGROUPS, *tile), dtype, transforms=_transforms(tile, dtype))
    pl.run_scoped(
        compute_tiles,
        pipeline(0, 0).get_allocations(*xs, *ws),
        [buffer] * buffers,
        plgpu.Barrier(num_barriers=_COMPUTE_WARPGROUPS),
        collective_axes="warpgroup",
    )


def _finish(
    product: Product,
    totals: Sequence[Array],
    barrier: Any,
    sources: Sequence[Any],
    targets: Sequence[Any],
    buffers: Sequence[Any],
) -> None:
    """Compute a warpgroup's result tiles from its sums and `sources`, and start writing them."""
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the results of the previous tile
    source_buffers = buffers[len(buffers) - len(sources) :]
    for source, buffer in zip(sources, source_buffers, strict=True):
        plgpu.copy_gmem_to_smem(source, buffer, barrier)
        plgpu.barrier_wait(barrier)
    tiles = [buffer[...].astype(jnp.float32) for buffer in source_buffers]
    results = product.finish(*totals, *tiles)
    for i, (values, target) in enumerate(zip(results, targets, strict=True)):
        buffer = buffers[i % len(buffers)]
        if i >= len(buffers):
            plgpu.wait_smem_to_gmem(len(buffers) - 1, wait_read_only=True)
        buffer[...] = values.astype(buffer.dtype)
        plgpu.commit_smem()  # all threads have read `tiles` before their buffer is overwritten
        plgpu.copy_smem_to_gmem(buffer, target)


def sample(
    a: Float[Array, "T N"], c: Float[Array, "T D"], mask: BlockMask, tiles: GpuTiles
) -> Float[Array, "nonzero b b"]:
    """See `tiled.Kernels`."""
    block = mask.block
    if padding := -a.shape[0] % tiles.tile_k:
        a, c = (jnp.pad(operand, ((0, padding), (0, 0))) for operand in (a, c))
    kernel = _kernel(
        functools.partial(_sample, block=block, settings=tiles),
        [jax.ShapeDtypeStruct((mask.nonzero * block, block), a.dtype)],
        "sampled",
    )
    (blocks,) = kernel(mask.rows, mask.columns, a, c)
    return blocks.reshape(-1, block, block)


def _sample(
    rows: Any, columns: Any, a: Any, c: Any, output: Any, *, block: int, settings: GpuTiles
) -> None:
    tile, step_tile, dtype = (block, block), (settings.tile_k, block), a.dtype
    stages = _stages(settings, [step_tile] * 2, [tile], dtype)

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
                grid=(a.shape[0] // settings.tile_k,),
                in_specs=[
                    _spec(step_tile, dtype, lambda t: (t, row), delay=1),
                    _spec(step_tile, dtype, lambda t: (t, column), delay=1),
                ],
                max_concurrent_steps=stages,
            )
            pipeline(a, c)
            return total[...]

        total = pl.run_scoped(multiply, plgpu.ACC(tile, jnp.float32))

        def write(buffer: Any) -> None:
            buffer[...] = total.astype(dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(buffer, output.at[pl.ds(n * block, block)])
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        pl.run_scoped(write, plgpu.SMEM(tile, dtype, transforms=_transforms(tile, dtype)))


def _step_ranges(steps: Steps, results: int) -> tuple[Int[Array, " r"], Int[Array, " r"]]:
    """Return the first step and the number of valid steps of each result."""
    tiles = jnp.arange(results, dtype=jnp.int32)
    starts = jnp.searchsorted(steps.result, tiles).astype(jnp.int32)
    counts = jax.ops.segment_sum(steps.valid, steps.result, results, indices_are_sorted=True)
    return starts, counts


def _kernel(
    body: Callable[..., None], out: Sequence[jax.ShapeDtypeStruct], name: str, warpgroups: int = 1
) -> Callable[..., Any]:
    """Return a kernel with one thread block of `warpgroups` on every multiprocessor."""
    threads: Any = {"num_threads": warpgroups, "thread_name": "warpgroup"} if warpgroups > 1 else {}
    return plgpu.kernel(
        body,
        out_type=list(out),
        grid=(_multiprocessors(),),
        grid_names=("sm",),
        kernel_name=name,
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        **threads,
    )


def _multiprocessors() -> int:
    """Return the number of streaming multiprocessors of the current mesh's or the default device.

    132, that of an H200, if neither says it.
    """
    of_mesh = getattr(jax.sharding.get_abstract_mesh().abstract_device, "num_cores", None)
    return of_mesh or getattr(jax.devices()[0], "core_count", None) or 132


def _stages(
    settings: GpuTiles,
    step: Sequence[tuple[int, int]],
    resident: Sequence[tuple[int, int]],
    dtype: jnp.dtype,
) -> int:
    """Return the number of stages: steps whose tiles fit shared memory beside the resident tiles.

    Raises `UnsupportedTiles` for fewer than two.
    """
    step_bytes, resident_bytes = (
        sum(map(math.prod, tiles)) * jnp.dtype(dtype).itemsize for tiles in (step, resident)
    )
    fitting = (_SHARED_BYTES - resident_bytes) // step_bytes
    if min(fitting, settings.stages) < 2:
        raise UnsupportedTiles(
            f"shared memory for {fitting} of {settings.stages} stages, accepted 2 and more"
        )
    return min(settings.stages, fitting)


def _spec(
    tile: tuple[int, int], dtype: jnp.dtype, index: Callable[..., Any], delay: int = 0
) -> plgpu.BlockSpec:
    """Return a block spec. Its buffer is reused `delay` steps later, if wgmma still reads it."""
    return plgpu.BlockSpec(tile, index, transforms=_transforms(tile, dtype), delay_release=delay)


def _transforms(tile: tuple[int, int], dtype: jnp.dtype) -> tuple[Any, ...]:
    size = jnp.dtype(dtype).itemsize
    swizzle = plgpu.find_swizzle(tile[1] * size * 8)
    return plgpu.TilingTransform((8, swizzle // size)), plgpu.SwizzleTransform(swizzle)
