"""Tiles do not change results, and are refused where they do not fit the processor."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.block_sparse_matmul import (
    BlockMask,
    kept_rows,
    pallas_gpu,
    pallas_tpu,
    reference,
    tuned,
    xla,
)
from kernels.block_sparse_matmul.tiled import Tiled
from kernels.block_sparse_matmul.tiles import GpuTiles, TpuTiles, UnsupportedTiles
from kernels.block_sparse_matmul.workloads import MODELS, operations
from tests.tolerances import assert_close

KEPT = kept_rows(jnp.array([0, 2]), 128)
MASK = BlockMask.of(np.array([[1, 0, 1], [0, 1, 1]]), 128)


def test_tiles_do_not_change_results() -> None:
    check_operations(
        Tiled(pallas_tpu, TpuTiles(row_bytes=512, token_bytes=512, sampled_bytes=640)), "float32"
    )


@pytest.mark.parametrize(
    ("tiles", "names"),
    [
        (
            GpuTiles(tile_m=128, tile_k=64, tile_n=64, stages=2, grid_tile_width=1),
            ("row", "row_pairs", "swiglu", "swiglu_gradients", "sampled"),
        ),
        (GpuTiles(tile_m=64, tile_k=128, stages=6), ("column", "row", "sampled")),
        (GpuTiles(tile_m=64, tile_n=256), ("row",)),
        (GpuTiles(tile_m=256, tile_n=64), ("row_pairs",)),
    ],
)
@pytest.mark.usefixtures("made_up_gpu")
def test_gpu_tiles_do_not_change_results(tiles: GpuTiles, names: tuple[str, ...]) -> None:
    check_operations(Tiled(pallas_gpu, tiles), "bfloat16", names)


def check_operations(
    backend: Tiled, dtype: str, names: Sequence[str] = tuple(name for _, name in tuned.OPERATIONS)
) -> None:
    """Compare with the reference, for more tokens than one tile has."""
    rng = np.random.default_rng(0)
    shapes = {"x": (300, 256), "h": (300, 256), "w": (512, 256), "v": (512, 256), "c": (300, 384)}
    arrays = {name: jnp.asarray(rng.normal(size=shape), dtype) for name, shape in shapes.items()}
    float32 = {name: array.astype(jnp.float32) for name, array in arrays.items()}

    def results(backend: Any, row: Any, x: Any, h: Any, w: Any, v: Any, c: Any) -> dict[str, Any]:
        return {
            "column": lambda: backend.column(x, w, KEPT),
            "row": lambda: row((h,), (w,)),
            "row_pairs": lambda: row((h, 2 * h), (w, v)),
            "swiglu": lambda: backend.swiglu(x, w / 8, v / 8, KEPT),
            "swiglu_gradients": lambda: backend.swiglu_gradients(x, w / 8, v / 8, h, KEPT),
            "sampled": lambda: backend.sampled(h, c, MASK),
        }

    def pairs(xs: Any, ws: Any) -> Any:
        return sum(reference.row(x, w, KEPT) for x, w in zip(xs, ws, strict=True))

    actual = results(backend, lambda xs, ws: backend.row(xs, ws, KEPT), **arrays)
    # The reference has no swiglu_gradients. Those of XLA are tested against it elsewhere.
    expected = results(reference, pairs, **float32)
    expected["swiglu_gradients"] = results(xla, pairs, **float32)["swiglu_gradients"]
    for name in names:
        leaves = (jax.tree.leaves(results[name]()) for results in (actual, expected))
        for array, desired in zip(*leaves, strict=True):
            assert_close(array.astype(jnp.float32), desired, dtype, "product")


@pytest.mark.parametrize(
    ("kernels", "tiles", "operation", "message"),
    [
        (
            pallas_gpu,
            GpuTiles(tile_m=256),
            ("rows", "column"),
            "1 × 256 × 128 sums per warpgroup",
        ),
        (pallas_gpu, GpuTiles(tile_m=64), ("rows", "swiglu"), "2 × 32 × 128 sums"),
        (
            pallas_gpu,
            GpuTiles(tile_m=256),
            ("rows", "row_pairs"),
            "shared memory for 1 of 4 stages",
        ),
        (
            pallas_gpu,
            GpuTiles(tile_k=96),
            ("mask", "column"),
            "tile_k: 96, accepted divisors of 128",
        ),
        (pallas_gpu, GpuTiles(stages=1), ("mask", "sampled"), "shared memory for . of 1 stages"),
        (pallas_tpu, TpuTiles(token_bytes=2**18), ("mask", "column"), "bytes of VMEM, accepted"),
    ],
)
def test_tiles_that_do_not_fit_are_refused(
    kernels: Any, tiles: Any, operation: tuple[str, str], message: str
) -> None:
    workload = MODELS["small"]._replace(tokens=2**17, width=512)
    program = operations(workload, Tiled(kernels, tiles))[operation]
    with pytest.raises(UnsupportedTiles, match=message):
        jax.jit(program.function).trace(*program.arguments)


@pytest.mark.parametrize("operation", ["swiglu", "swiglu_gradients"])
def test_three_stages_fit_on_hopper(operation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """For one result, and for three results with an extra input."""
    counts, count = [], pallas_gpu._stages
    monkeypatch.setattr(pallas_gpu, "_stages", lambda *args: counts.append(count(*args)) or 2)
    program = operations(MODELS["llama-2-7b"], Tiled(pallas_gpu, GpuTiles()))["rows", operation]
    jax.jit(program.function).trace(*program.arguments)
    assert counts == [3]
