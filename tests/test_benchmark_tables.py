"""Tables of single steps, by hand."""

from typing import Any

import pytest

from sat_jax.errors import UserError
from sat_jax.results.benchmarks import (
    blocks_table,
    memory_tables,
    moves_table,
    peer_tables,
    steps_table,
)
from sat_jax.results.speed import ABOVE_BOUND_NOTE

DEVICE = {"platform": "gpu", "kind": "a GPU", "count": 1}


GIB = 2**30


def row(execution: str, rate: float, **rest: Any) -> dict[str, Any]:
    setting = {"target": "H", "model": "m", "rows": 2, "row_length": 500, "dtype": "bfloat16"}
    setting |= {"kernels": "xla"}
    kept = {"kept_heads": 1 - rate, "kept_channels": 1 - rate}
    case = {
        "part": "step",
        "execution": execution,
        "rate": rate,
        "optimizer": "lion",
        "remat": "full",
    }
    return {**setting, **case, **kept, **rest}


def cells(table: str, line: int) -> list[str]:
    return [cell.strip() for cell in table.splitlines()[line].strip("|").split("|")]


def test_memory_is_added_up_and_stands_beside_dense() -> None:
    def used(state: int, resting: int, temporary: int) -> dict[str, int]:
        names = ("state_bytes", "resting_bytes", "temporary_bytes")
        return dict(zip(names, (n * GIB for n in (state, resting, temporary)), strict=True))

    (only,) = memory_tables(
        [
            row("gather", 0.5, **used(1, 1, 1)),  # superseded
            row("dense", 0.0, **used(6, 0, 4)),
            row("gather", 0.5, **used(3, 5, 4), refresh_bytes=7 * GIB),
            row("kernel", 0.5, **used(6, 0, 2)),
        ]
    )
    table = only.markdown()
    assert cells(table, 2)[:3] == ["dense", "100 %", "100 %"]
    sizes = ["3.0 GiB", "5.0 GiB", "4.0 GiB", "12.0 GiB", "1.20×", "7.0 GiB"]
    assert cells(table, 3) == ["r = 0.5, gather", "50 %", "50 %", *sizes]
    assert cells(table, 4)[-3:] == ["8.0 GiB", "0.80×", "-"]
    assert table.endswith(
        "m; 1,000 tokens in rows of 500; bfloat16; lion; remat full; kernels xla; H."
    )


def test_speedups_above_their_bound_are_marked() -> None:
    case = {"benchmark": "steps", "date": "d", "device": DEVICE, "wall_seconds": 2.0}
    dense = row("dense", 0.0, speedup_wall=1.0, bound=1.0, **case)
    rows = [dense, row("gather", 0.5, speedup_wall=1.68, bound=1.56, **case)]
    rows.append(row("mask", 0.5, speedup_wall=1.1, bound=1.0, **case))
    rows.append(row("gather", 0.2, speedup_wall=9.0, bound=1.0, **(case | {"date": "other"})))
    table = steps_table(rows)[0].markdown()
    speedups = [cells(table, line)[4:] for line in (2, 3, 4)]
    assert speedups == [["1.00×", "1.00×"], ["1.68×\u2021", "1.56×"], ["1.10×", "-"]]
    assert table.endswith(
        "m; 1,000 tokens in rows of 500; bfloat16; a GPU. " + ABOVE_BOUND_NOTE + "."
    )
    assert steps_table(rows[1:]) == []


def test_dense_steps_beside_transformers_and_the_parts_of_a_refresh() -> None:
    case = {"date": "d", "device": DEVICE}
    ours = {"speed_against_transformers_wall": 0.5, "speed_against_transformers_cpu": 0.4}
    peer = row("dense", 0.0, benchmark="peer", library="sat_jax", wall_seconds=3.0, **case, **ours)
    newer = peer | {"work": "step", "wall_seconds": 2.0, "device": DEVICE | {"kind": "new"}}
    products = peer | {"work": "products", "library": "transformers", "wall_seconds": 0.25}
    other = peer | {"rows": 4}
    first, second = peer_tables([peer, newer, products, other])
    assert first.rows == (
        ("dense step", "sat_jax", "2.00 s", "0.50×", "0.40×"),
        ("products of a layer", "torch", "0.25 s", "0.50×", "0.40×"),
    )
    assert first.caption == "m; 1,000 tokens in rows of 500; bfloat16; new"
    assert "2,000" in second.caption
    step = row("gather", 0.4, benchmark="moves", move="step", wall_seconds=2.0, **case)
    step |= {"share_of_a_step": 1.0}
    probe = step | {"move": "probe", "wall_seconds": 0.5, "share_of_a_step": 0.25}
    (moves,) = moves_table([probe | {"date": "c"}, step, probe])
    assert moves.rows == (("step", "2.00 s", "1.000"), ("probe", "0.50 s", "0.250"))
    assert peer_tables([step]) == moves_table([peer]) == []


def test_block_sparse_products_beside_dense_ones() -> None:
    case = {"benchmark": "blocks", "date": "d", "device": DEVICE, "block": 64, "density": 0.125}
    case |= {"speedup_wall": 1.0, "speedup_cpu": 1.0, "wall_seconds": 0.5}
    sparse = {"library": "sat_jax", "wall_seconds": 0.125, "speedup_wall": 4.0, "speedup_cpu": 3.5}
    rows = [
        row("dense", 0.0, **case | {"work": "product", "library": "dense"}),
        row("dense", 0.0, **case | {"work": "product"} | sparse),
        row("dense", 0.0, **case | {"work": "mlp"} | sparse),
        row("dense", 0.0, **case | {"work": "mlp"} | sparse | {"date": "earlier"}),
    ]
    (table,) = blocks_table(rows)
    cells_of_both = ("64", "12.5 %", "sat_jax", "125 ms", "4.00×", "3.50×", "-", "8×")
    assert table.rows == (("MLP with gradients", *cells_of_both), ("product", *cells_of_both))
    assert blocks_table(rows[1:]) == []


def test_measured_mlps_beside_the_roofline() -> None:
    case = {"benchmark": "blocks", "date": "d", "device": DEVICE, "block": 64, "density": 0.25}
    case |= {"speedup_wall": 3.0, "speedup_cpu": 3.0, "wall_seconds": 1.0, "work": "mlp"}
    case |= {"model": "4096x1024", "rows": 2, "row_length": 1024}
    dense = row("dense", 0.0, **case | {"library": "dense"})
    sparse = row("dense", 0.0, **case | {"library": "sat_jax"})

    def predicted(seconds: float) -> str:
        """With a copy of 256 MiB in so many seconds."""
        copy = {"work": "copy", "bytes": 2**28, "wall_seconds": seconds}
        (table,) = blocks_table([dense, sparse, row("dense", 0.0, **case | copy)])
        return table.rows[0][7]

    assert predicted(1e-6) == "4.0×, 4.0×", "FLOPs limit both"
    # 12 · 2048 · 4096 · 1024 FLOP take 1 s: 103 GFLOP/s. Bytes limit nothing when fused.
    kernel_by_kernel, fused = predicted(0.5).split(", ")
    assert fused == "4.0×" and 1 < float(kernel_by_kernel[:-1]) < 3


def test_memory_is_compared_with_a_dense_step() -> None:
    used = {"state_bytes": GIB, "resting_bytes": 2 * GIB, "temporary_bytes": 3 * GIB}
    with pytest.raises(UserError, match="no dense step among the rows of m"):
        memory_tables([row("gather", 0.5, **used), row("dense", 0.0, error="x")])
