"""Tiles are held by the processor or refused, and of no effect on values."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.benchmark import MODELS
from kernels.block_sparse_matmul import (
    BlockMask,
    kept_rows,
    pallas_gpu,
    pallas_tpu,
    reference,
    tuned,
    xla,
)
from kernels.block_sparse_matmul.arg_specs import operations
from kernels.block_sparse_matmul.tiled import Tiled
from kernels.block_sparse_matmul.tiles import GpuTiles, Misfit, TpuTiles
from tests.tolerances import assert_close

KEPT = kept_rows(jnp.array([0, 2]), 128)
MASK = BlockMask.of(np.array([[1, 0, 1], [0, 1, 1]]), 128)


def test_tiles_are_of_no_effect_on_values() -> None:
    check_operations(Tiled(pallas_tpu, TpuTiles(row=512, tokens=512, sampled=640)), "float32")


@pytest.mark.parametrize(
    ("tiles", "names"),
    [
        (
            GpuTiles(tall=128, factor=64, result=64, stages=2, snake=1),
            ("row", "row_pairs", "swiglu", "swiglu_gradients", "sampled"),
        ),
        (GpuTiles(tall=64, factor=128, stages=6), ("column", "row", "sampled")),
        (GpuTiles(tall=64, result=256), ("row",)),
        (GpuTiles(tall=256, result=64), ("row_pairs",)),
    ],
)
@pytest.mark.usefixtures("made_up_gpu")
def test_tiles_are_of_no_effect_on_gpu(tiles: GpuTiles, names: tuple[str, ...]) -> None:
    check_operations(Tiled(pallas_gpu, tiles), "bfloat16", names)


def check_operations(
    backend: Tiled, dtype: str, names: Sequence[str] = tuple(name for _, name in tuned.OPERATIONS)
) -> None:
    """Beside the reference, of more tokens than fit a tile."""
    made = np.random.default_rng(0)
    shapes = {"x": (300, 512), "h": (300, 256), "w": (512, 512), "v": (512, 512), "c": (300, 384)}
    given = {name: jnp.asarray(made.normal(size=shape), dtype) for name, shape in shapes.items()}
    wide = {name: array.astype(jnp.float32) for name, array in given.items()}

    def results(by: Any, row: Any, x: Any, h: Any, w: Any, v: Any, c: Any) -> dict[str, Any]:
        return {
            "column": lambda: by.column(x, w, KEPT),
            "row": lambda: row((h,), (w,)),
            "row_pairs": lambda: row((h, 2 * h), (w, v)),
            "swiglu": lambda: by.swiglu(x, w / 8, v / 8, KEPT),
            "swiglu_gradients": lambda: by.swiglu_gradients(x, w / 8, v / 8, h, KEPT),
            "sampled": lambda: by.sampled(h, c, MASK, None),
        }

    def pairs(xs: Any, ws: Any) -> Any:
        return sum(reference.row(x, w, KEPT) for x, w in zip(xs, ws, strict=True))

    found = results(backend, lambda xs, ws: backend.row(xs, ws, KEPT), **given)
    # The gradients of SwiGLU are not of the definition's own: XLA's, which are held to it.
    expected = results(reference, pairs, **wide)
    expected["swiglu_gradients"] = results(xla, pairs, **wide)["swiglu_gradients"]
    for name in names:
        for actual, desired in zip(
            *(jax.tree.leaves(by[name]()) for by in (found, expected)), strict=True
        ):
            assert_close(actual.astype(jnp.float32), desired, dtype, "product")


@pytest.mark.parametrize(
    ("loops", "tiles", "operation", "message"),
    [
        (pallas_gpu, GpuTiles(tall=256), ("rows", "column"), "1 × 256 × 128 sums of a warpgroup"),
        (pallas_gpu, GpuTiles(tall=64), ("rows", "swiglu"), "2 × 32 × 128 sums"),
        (pallas_gpu, GpuTiles(tall=256), ("rows", "row_pairs"), "shared memory for 1 of 4 stages"),
        (
            pallas_gpu,
            GpuTiles(factor=96),
            ("mask", "column"),
            "factor: 96, accepted divisors of 128",
        ),
        (pallas_gpu, GpuTiles(stages=1), ("mask", "sampled"), "shared memory for . of 1 stages"),
        (pallas_tpu, TpuTiles(tokens=2**18), ("mask", "column"), "bytes of VMEM, accepted"),
    ],
)
def test_what_the_processor_does_not_hold_is_refused(
    loops: Any, tiles: Any, operation: tuple[str, str], message: str
) -> None:
    spec = MODELS["small"]._replace(tokens=2**17, width=512)
    program = operations(spec, Tiled(loops, tiles))[operation]
    with pytest.raises(Misfit, match=message):
        jax.jit(program.function).trace(*program.arguments)


@pytest.mark.parametrize("operation", ["swiglu", "swiglu_gradients"])
def test_three_stages_find_room_on_hopper(operation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many results there are, and what is loaded to make them."""
    counted, count = [], pallas_gpu._stages
    monkeypatch.setattr(pallas_gpu, "_stages", lambda *given: counted.append(count(*given)) or 2)
    program = operations(MODELS["llama-2-7b"], Tiled(pallas_gpu, GpuTiles()))["rows", operation]
    jax.jit(program.function).trace(*program.arguments)
    assert counted == [3]
