"""Comparison of measured rows with the targets that docs/efficiency.md states."""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from sat_jax.results.rows import STEP_SETTING, Row, latest

# Products in bfloat16 without sparsity, FLOP/s by the data sheet.
_NOMINAL_PEAK = {"NVIDIA H200": 990e12}
_LARGE_STEP = 16_384  # tokens from which the targets of steps apply
_LARGE_PRODUCT = (
    4096  # tokens from which kernels are compared with cuBLAS, and to which with gather
)


class Bar(NamedTuple):
    """A measured value and the least value that reaches the target."""

    text: str
    value: float
    target: float

    def __str__(self) -> str:
        outcome = "reached" if self.value >= self.target else "short"
        return f"{outcome:<8} {self.text}: {self.value:.2f}; target {self.target:.2f}"


def bars(rows: Sequence[Row]) -> list[str]:
    """Return a line for each target, of rows of one device and commit: reached, short, or not
    measured. Rows with an `error` count as not measured."""
    measured = [row for row in rows if "error" not in row]
    lines = []
    for title, compare in _COMPARISONS.items():
        compared = [str(bar) for bar in compare(measured)]
        lines += compared or [f"{'-':<8} {title}: not measured"]
    return lines


def _dense_steps(rows: Sequence[Row]) -> Iterator[Bar]:
    for row in _large_steps(rows):
        peak = _NOMINAL_PEAK.get(row["device"]["kind"])
        if row["execution"] == "dense" and peak:
            share = row["model_flops"] / row["seconds"] / peak
            text = f"{_step(row)}, dense: {row['seconds']:.3f} s, share of the peak (MFU)"
            yield Bar(text, share, 0.55)


def _speedups(rows: Sequence[Row]) -> Iterator[Bar]:
    for row in _large_steps(rows):
        setting = {name: row[name] for name in STEP_SETTING}
        dense = latest(rows, part="step", execution="dense", **setting)
        if dense and 0 < row["rate"] < 1:
            speedup = dense["seconds"] / row["seconds"]
            text = f"{_step(row)}, {row['execution']} r = {row['rate']:g}: {speedup:.2f}x dense"
            text += f", FLOP bound {row['bound']:.2f}x, share of the bound"
            yield Bar(text, speedup / row["bound"], 0.92)


def _large_steps(rows: Sequence[Row]) -> Iterator[Row]:
    for row in rows:
        if row.get("part") == "step" and row["rows"] * row["row_length"] >= _LARGE_STEP:
            yield row


def _step(row: Row) -> str:
    return f"{row['model']}, {row['rows']} x {row['row_length']} tokens"


def _kernels_against_dense(rows: Sequence[Row]) -> Iterator[Bar]:
    for row, of in _kernels(rows):
        dense = of(implementation="dense", density=1.0, block=None)
        if dense and row["tokens"] >= _LARGE_PRODUCT:
            share = row["flops"] / row["seconds"] / (dense["flops"] / dense["seconds"])
            yield Bar(f"{_product(row)}: share of the dense product's FLOP/s", share, 0.85)


def _kernels_against_gather(rows: Sequence[Row]) -> Iterator[Bar]:
    for row, of in _kernels(rows):
        gather = of(implementation="xla", density=row["density"], block=row["block"])
        if gather and row["tokens"] <= _LARGE_PRODUCT:
            yield Bar(
                f"{_product(row)}: speed-up over gather", gather["seconds"] / row["seconds"], 1
            )


def _kernels(rows: Sequence[Row]) -> Iterator[tuple[Row, Callable[..., Row | None]]]:
    """Yield the rows of kernels for kept rows, each with a look-up in the same product's rows."""
    products = [row for row in rows if row.get("benchmark") == "kernels"]
    for row in products:
        if row["implementation"].startswith("pallas") and not row["program"].startswith("mask"):
            same = {name: row[name] for name in ("model", "program", "tokens")}
            yield row, lambda same=same, **fields: latest(products, **same, **fields)


def _product(row: Row) -> str:
    size = f"{row['model']}, {row['tokens']} tokens, {row['density']:g} in blocks of {row['block']}"
    return f"{size}, {row['program']}"


def _against_transformers(rows: Sequence[Row]) -> Iterator[Bar]:
    for row in rows:
        if row.get("benchmark") == "peer" and (row["work"], row["library"]) == ("step", "sat_jax"):
            text = f"{_step(row)}, {row['dtype']}: {row['wall_seconds']:.3f} s, speed-up over"
            speed = row["speed_against_transformers_wall"]
            yield Bar(f"{text} transformers {row['transformers']}", speed, 1)


_COMPARISONS: dict[str, Callable[[Sequence[Row]], Iterator[Bar]]] = {
    "dense step, share of the peak": _dense_steps,
    "SAT step, share of its FLOP bound": _speedups,
    "kernels against dense products": _kernels_against_dense,
    "kernels against gather": _kernels_against_gather,
    "dense step against transformers": _against_transformers,
}
