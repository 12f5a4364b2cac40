"""Tables of single steps, by hand."""

import json
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from sat_jax.errors import UserError
from sat_jax.report.pictures import outdated_pictures, pictures
from sat_jax.report.size_figures import _speed
from sat_jax.report.sizes import kernels, memory, speed
from tests.tolerances import assert_close

GIB = 2**30


def row(execution: str, rate: float, part: str = "step", **rest: Any) -> dict[str, Any]:
    setting = {"target": "H", "model": "m", "rows": 2, "row_length": 500, "dtype": "bfloat16"}
    setting |= {"kernels": "xla"}
    kept = {"kept_heads": 1 - rate, "kept_channels": 1 - rate}
    case = {
        "part": part,
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

    table = memory(
        [
            row("gather", 0.5, **used(1, 1, 1)),  # superseded
            row("dense", 0.0, **used(6, 0, 4)),
            row("gather", 0.5, **used(3, 5, 4), refresh_bytes=7 * GIB),
            row("kernel", 0.5, **used(6, 0, 2)),
        ]
    )
    assert cells(table, 2)[:3] == ["dense", "100 %", "100 %"]
    sizes = ["3.0 GiB", "5.0 GiB", "4.0 GiB", "12.0 GiB", "1.20×", "7.0 GiB"]
    assert cells(table, 3) == ["r = 0.5, gather", "50 %", "50 %", *sizes]
    assert cells(table, 4)[-3:] == ["8.0 GiB", "0.80×", "-"]
    assert table.endswith(
        "m; 1,000 tokens in rows of 500; bfloat16; lion; remat full; kernels xla; H."
    )


def test_speed_stands_beside_both_bounds() -> None:
    """Of the dense step's 10 ms, 2 are no neuron's; half of the neurons leave 2 + 8 / 2 ms."""
    used = {"state_bytes": GIB, "resting_bytes": 0, "temporary_bytes": GIB, "compile_seconds": 9.4}
    dense = row("dense", 0.0, seconds=10e-3, bound=1.0, model_flops=4.0, **used)
    half = row("kernel", 0.5, seconds=8e-3, bound=2.0, model_flops=2.0, **used)
    nothing = row("gather", 1.0, seconds=2e-3, bound=1e9, model_flops=0.0)
    peak = row("dense", 0.0, "peak", seconds=1e-3, model_flops=1.0)
    alone = row("kernel", 0.5, "optimizer", seconds=1e-3)
    failed = row("gather", 0.5, bound=2.0, error="out of memory")
    table = speed([peak, half, nothing, alone, failed, dense])
    numbers = ["10.0 ms", "100,000", "40 %", "1.00×", "1.00×", "100 %", "1.00×", "-"]
    assert cells(table, 2)[3:] == [*numbers, "2.0 GiB", "9 s"]
    numbers = ["8.0 ms", "125,000", "25 %", "1.25×", "2.00×", "62 %", "1.67×", "1.0 ms"]
    numbers += ["2.0 GiB", "9 s"]
    assert cells(table, 3) == ["r = 0.5, kernel", "50 %", "50 %", *numbers]
    assert cells(table, 4)[:2] == ["r = 0.5, gather", "out of memory"]
    assert len(table.split("\n\n")[0].splitlines()) == 5
    with pytest.raises(UserError, match="no dense step among the rows of m"):
        speed([half])
    table = speed([row("dense", 0.0, error="out of memory"), half])
    assert [cells(table, line)[:2] for line in (2, 3)] == [
        ["dense", "out of memory"],
        ["r = 0.5, kernel", "not compared: the dense step failed"],
    ]


def test_kernels_stand_beside_dense_xla_and_pytorch() -> None:
    """Half of the products in 60 % of the time: 83 % of the dense rate."""

    def product(implementation: str, seconds: float | None, **rest: Any) -> dict[str, Any]:
        case = {"model": "m", "program": "row", "tokens": 4096, "density": 0.5, "block": 128}
        made = {"seconds": seconds} if seconds else {"error": "no room"}
        flops = {"flops": 6e9 * rest.get("density", 0.5), "device": {"kind": "H"}}
        return {**case, "implementation": implementation, **made, **flops, **rest}

    whole = product("dense", 1e-3, density=1.0, block=None)
    ours, failed = product("pallas_gpu", 0.6e-3), product("pallas_gpu", None, density=0.25)
    table = kernels([whole, ours, failed, product("xla", 0.9e-3), product("torch_bsr", 0.3e-3)])
    assert cells(table, 2)[:3] == ["4,096", "25 %", "no room"]
    numbers = ["0.600 ms", "5", "83 %", "1.67×", "2.00×", "1.50×", "0.50×"]
    assert cells(table, 3) == ["4,096", "50 %", *numbers]
    assert table.endswith("row; m; blocks of 128; pallas_gpu; H.")
    assert cells(kernels([ours]), 2)[4:] == ["-", "-", "2.00×", "-", "-"]
    with pytest.raises(UserError, match="no kernel among the rows"):
        kernels([whole])


def test_pictures_are_of_the_files_that_there_are(tmp_path: Path) -> None:
    used = {"state_bytes": GIB, "resting_bytes": GIB, "temporary_bytes": GIB, "bound": 1.5}
    time = {"seconds": 1e-3, "model_flops": 1.0} | used
    steps = [row("dense", 0.0, **time), row("gather", 0.5, **time), row("kernel", 0.5, **time)]
    folder = tmp_path / "pictures"
    assert not pictures(tmp_path, folder)
    (tmp_path / "memory.jsonl").write_text("\n".join(map(json.dumps, steps)) + "\n")
    assert pictures(tmp_path, folder) == [folder / "memory.png"]
    first = (folder / "memory.png").read_bytes()
    more = [*steps, row("gather", 1.0, **time), row("gather", 0.2, error="out of memory")]
    (tmp_path / "efficiency.jsonl").write_text("\n".join(map(json.dumps, more)) + "\n")
    assert pictures(tmp_path, folder) == [folder / "memory.png", folder / "efficiency.png"]
    assert (folder / "memory.png").read_bytes() == first
    assert outdated_pictures(tmp_path, folder) == []
    with (tmp_path / "memory.jsonl").open("a") as rows:
        rows.write(json.dumps(row("gather", 0.7, **time)) + "\n")
    (folder / "efficiency.png").unlink()
    assert outdated_pictures(tmp_path, folder) == [folder / "memory.png", folder / "efficiency.png"]


def test_lines_of_a_picture_are_speeds_and_their_bounds() -> None:
    def timed(execution: str, rate: float, seconds: float, bound: float) -> dict[str, Any]:
        return row(execution, rate, seconds=seconds, bound=bound)

    rows = [timed("dense", 0.0, 1.0, 1.0), timed("gather", 0.4, 0.8, 1.5)]
    rows += [timed("gather", 0.2, 0.9, 1.2), timed("gather", 1.0, 0.5, 1e9)]
    axes = Figure().add_subplot()
    _speed(axes, rows)
    first, bound, second, *_ = (list(line.get_ydata()) for line in axes.lines)
    assert_close(first, [1 / 0.9, 1 / 0.8], "float32", "forward")
    assert_close(bound, [1.2, 1.5], "float32", "forward")
    # Half of the dense step is no neuron's.
    assert_close(second, [1 / (0.5 + 0.5 / 1.2), 1 / (0.5 + 0.5 / 1.5)], "float32", "forward")
