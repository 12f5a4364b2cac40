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
from kernels.block_sparse_matmul.tiled import Product, Steps, finer, largest_tile, split
from kernels.block_sparse_matmul.tiles import GpuTiles, Misfit

NAME = "pallas_gpu"
# Two warpgroups compute, each for its own tokens, and a third one brings the tiles. One holds
# 128 × 128 float32 sums in its registers, or two of 64 × 128.
_WORKERS = 2
_SUMS = 128 * 128
_UNIT = 64
_CARRIER_REGISTERS = 40
# Places of a result in shared memory, taken in turn where there are more of them. What is loaded to
# make results of lies in the last place.
_PLACES = 2
_SHARED_BYTES = 216 * 1024  # of the 227 KiB that a block of threads may have


def refusal(dtype: jnp.dtype, width: int, block: int) -> str | None:
    """See `backends.Backend`."""
    if dtype not in (jnp.bfloat16, jnp.float16):
        return f"{dtype} operands, accepted bfloat16 and float16"
    if block not in (64, 128):
        return f"blocks of {block}, accepted 64 and 128"
    if width % _UNIT:
        return f"rows of {width}, accepted multiples of {_UNIT}"
    return None


def factor_tile(size: int, _dtype: jnp.dtype, tiles: GpuTiles) -> int:
    """See `tiled.Loops`."""
    return largest_tile(size, _UNIT, tiles.factor)


def result_tile(size: int, _dtype: jnp.dtype, tiles: GpuTiles) -> int:
    """See `tiled.Loops`."""
    return largest_tile(size, _UNIT, tiles.result)


def contract(product: Product, tiles: GpuTiles) -> tuple[Float[Array, "T N"], ...]:
    """See `tiled.Product`."""
    product = finer(product, tiles.factor)
    tokens, dtype = product.xs[0].shape[0], product.xs[0].dtype
    # Two sums share the registers; two pairs, the shared memory.
    tall = tiles.tall // len(product.ws)
    if tall % _UNIT or product.sums * tall * product.result > _SUMS:
        sums = f"{product.sums} × {tall} × {product.result} sums"
        raise Misfit(f"{sums} of a warpgroup, accepted {_SUMS} in all, of multiples of {_UNIT}")
    # Padding is of no consequence: each token's results are its own.
    padded = -tokens % (tall * _WORKERS)
    xs, extras = (
        [jnp.pad(part, ((0, padded), (0, 0))) if padded else part for part in parts]
        for parts in (product.xs, product.extras)
    )
    kernel = _kernel(
        functools.partial(_contract, product=product, tall=tall, settings=tiles),
        [jax.ShapeDtypeStruct((tokens + padded, product.width), dtype)] * product.outputs,
        product.name,
        threads=_WORKERS + 1,
    )
    steps = product.steps
    # Steps that are not live are the only ones of their results.
    runs = () if product.even else _runs(steps, product.width // product.result)
    found = kernel(*runs, steps.factor, steps.row, steps.column, *xs, *product.ws, *extras)
    return tuple(y[:tokens] if padded else y for y in found)


def _contract(*refs: Any, product: Product, tall: int, settings: GpuTiles) -> None:
    runs, (factors, rows, columns), xs, ws, extras, outputs = split(
        refs,
        *(0 if product.even else 2, 3),
        *(len(product.xs), len(product.ws), len(product.extras), product.outputs),
    )
    dtype, tile = xs[0].dtype, (tall, product.result)
    x_tile = (tall * _WORKERS, product.factor)
    w_tile = (product.factor, product.result)
    if product.transposed:
        w_tile = w_tile[::-1]
    tiles = [x_tile] * len(xs) + [w_tile] * len(ws)
    places = min(len(outputs), _PLACES)
    assert len(extras) < places
    stages = _stages(settings, tiles, [tile] * _WORKERS * places, dtype)
    shape = (outputs[0].shape[0] // x_tile[0], product.width // product.result)

    def pipeline(m: Any, n: Any, step: Any = None, compute: Any = None) -> Any:
        """Over the steps of one result, for one tile of tokens."""
        if product.even:
            count = product.steps.result.shape[0] // shape[1]
            start = n * count
        else:
            start, count = (run[n] for run in runs)
        x_spec = _spec(x_tile, dtype, lambda s: (m, factors[start + s]))
        w_spec = _spec(w_tile, dtype, lambda s: (rows[start + s], columns[start + s]))
        return plgpu.emit_pipeline_warp_specialized(
            step,
            grid=(count,),
            memory_registers=_CARRIER_REGISTERS,
            in_specs=[x_spec] * len(xs) + [w_spec] * len(ws),
            max_concurrent_steps=stages,
            wg_axis="warpgroup",
            num_compute_wgs=_WORKERS,
            compute_context=compute,
        )

    def work(room: Any, rests: Sequence[Any], barriers: Any) -> None:
        worker = jax.lax.axis_index("warpgroup")
        mine = pl.ds(worker * tall, tall)

        def step(_: Any, *given: Any) -> Any:
            *tiles, sums = given
            x_tiles, w_tiles = tiles[: len(xs)], tiles[len(xs) :]
            for i, w in enumerate(w_tiles):
                w = w.transpose((1, 0)) if product.transposed else w
                plgpu.wgmma(sums[i % len(sums)], x_tiles[i % len(x_tiles)].at[mine], w)
            plgpu.wgmma_wait(0)
            return sums

        @plgpu.nd_loop((shape[0] * shape[1],), collective_axes="sm")
        def _(loop: Any) -> None:
            m, n = plgpu.planar_snake(loop.index[0], shape, 0, min(settings.snake, shape[0]))
            here = (
                pl.ds((m * _WORKERS + worker) * tall, tall),
                pl.ds(n * product.result, product.result),
            )

            def compute(run: Any) -> None:
                def sum_up(*sums: Any) -> None:
                    run(sums)
                    _finish(
                        product,
                        [total[...] for total in sums],
                        barriers.at[worker],
                        [ref.at[here] for ref in extras],
                        [ref.at[here] for ref in outputs],
                        [ref.at[worker] for ref in rests],
                    )

                pl.run_scoped(sum_up, *[plgpu.ACC(tile, jnp.float32)] * product.sums)

            pipeline(m, n, step, compute)(*xs, *ws, allocations=room)

        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    shared = plgpu.SMEM((_WORKERS, *tile), dtype, transforms=_transforms(tile, dtype))
    pl.run_scoped(
        work,
        pipeline(0, 0).get_allocations(*xs, *ws),
        [shared] * places,
        plgpu.Barrier(num_barriers=_WORKERS),
        collective_axes="warpgroup",
    )


def _finish(
    product: Product,
    totals: Sequence[Array],
    barrier: Any,
    sources: Sequence[Any],
    targets: Sequence[Any],
    places: Sequence[Any],
) -> None:
    """Makes one worker's results of its sums and `sources`, and sends them on their way."""
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # those of the tile before
    loaded = places[len(places) - len(sources) :]
    for source, there in zip(sources, loaded, strict=True):
        plgpu.copy_gmem_to_smem(source, there, barrier)
        plgpu.barrier_wait(barrier)
    tiles = [there[...].astype(jnp.float32) for there in loaded]
    results = product.finish(*totals, *tiles)
    for i, (values, target) in enumerate(zip(results, targets, strict=True)):
        there = places[i % len(places)]
        if i >= len(places):
            plgpu.wait_smem_to_gmem(len(places) - 1, wait_read_only=True)
        there[...] = values.astype(there.dtype)
        plgpu.commit_smem()  # by then all threads have read what was loaded
        plgpu.copy_smem_to_gmem(there, target)


def sample(
    a: Float[Array, "T N"], c: Float[Array, "T D"], mask: BlockMask, tiles: GpuTiles
) -> Float[Array, "nonzero b b"]:
    """See `tiled.Loops`."""
    block = mask.block
    if padded := -a.shape[0] % tiles.factor:
        a, c = (jnp.pad(part, ((0, padded), (0, 0))) for part in (a, c))
    kernel = _kernel(
        functools.partial(_sample, block=block, settings=tiles),
        [jax.ShapeDtypeStruct((mask.nonzero * block, block), a.dtype)],
        "sampled",
    )
    (found,) = kernel(mask.rows, mask.columns, a, c)
    return found.reshape(-1, block, block)


def _sample(
    rows: Any, columns: Any, a: Any, c: Any, output: Any, *, block: int, settings: GpuTiles
) -> None:
    tile, step_tile, dtype = (block, block), (settings.factor, block), a.dtype
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
                grid=(a.shape[0] // settings.factor,),
                in_specs=[
                    _spec(step_tile, dtype, lambda t: (t, row), delay=1),
                    _spec(step_tile, dtype, lambda t: (t, column), delay=1),
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


def _runs(steps: Steps, results: int) -> tuple[Int[Array, " r"], Int[Array, " r"]]:
    """Of each result its first step and how many are live."""
    places = jnp.arange(results, dtype=jnp.int32)
    starts = jnp.searchsorted(steps.result, places).astype(jnp.int32)
    counts = jax.ops.segment_sum(steps.live, steps.result, results, indices_are_sorted=True)
    return starts, counts


def _kernel(
    body: Callable[..., None], out: Sequence[jax.ShapeDtypeStruct], name: str, threads: int = 1
) -> Callable[..., Any]:
    """By `threads` warpgroups on every multiprocessor."""
    several: Any = {"num_threads": threads, "thread_name": "warpgroup"} if threads > 1 else {}
    return plgpu.kernel(
        body,
        out_type=list(out),
        grid=(_processors(),),
        grid_names=("sm",),
        kernel_name=name,
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        **several,
    )


def _processors() -> int:
    """Streaming multiprocessors: of the mesh's device where one is set, else of the default one, or
    those of an H200."""
    described = getattr(jax.sharding.get_abstract_mesh().abstract_device, "num_cores", None)
    return described or getattr(jax.devices()[0], "core_count", None) or 132


def _stages(
    settings: GpuTiles,
    step: Sequence[tuple[int, int]],
    resting: Sequence[tuple[int, int]],
    dtype: jnp.dtype,
) -> int:
    """For how many steps the tiles find room beside those that stay: two at the least."""
    sizes = [sum(map(math.prod, tiles)) * jnp.dtype(dtype).itemsize for tiles in (step, resting)]
    room = (_SHARED_BYTES - sizes[1]) // sizes[0]
    if min(room, settings.stages) < 2:
        raise Misfit(f"shared memory for {room} of {settings.stages} stages, accepted 2 and more")
    return min(settings.stages, room)


def _spec(
    tile: tuple[int, int], dtype: jnp.dtype, place: Callable[..., Any], delay: int = 0
) -> plgpu.BlockSpec:
    """A tile that is given up `delay` steps later, where wgmma may still read it."""
    return plgpu.BlockSpec(tile, place, transforms=_transforms(tile, dtype), delay_release=delay)


def _transforms(tile: tuple[int, int], dtype: jnp.dtype) -> tuple[Any, ...]:
    size = jnp.dtype(dtype).itemsize
    swizzle = plgpu.find_swizzle(tile[1] * size * 8)
    return plgpu.TilingTransform((8, swizzle // size)), plgpu.SwizzleTransform(swizzle)
