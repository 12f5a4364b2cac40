"""Tables of benchmarks, which time or compile single steps: not of runs."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from sat_jax.analysis.rows import STEP_SETTING, latest
from sat_jax.analysis.tables import markdown, percent, sides
from sat_jax.errors import UserError
from sat_jax.report.records import Record

Row = dict[str, Any]
MEMORY = ("state_bytes", "resting_bytes", "temporary_bytes")


def steps(rows: Sequence[Row]) -> str:
    """The last measurement of `scripts.benchmark --only steps`, each variant beside the dense
    step."""
    dense = latest(rows, benchmark="steps", execution="dense")
    if dense is None:
        raise UserError("no dense step among the rows")
    together = [
        r
        for r in rows
        if r.get("benchmark") == "steps"
        and r["date"] == dense["date"]
        and not r.get("dense_tokens")  # a variant up to commit 09323b3
    ]
    body = []
    for row in together:
        name = "dense" if row["execution"] == "dense" else f"r = {row['rate']:g}"
        name += {
            "mask": ", as multiplications by 0 and 1",
            "kernel": ", all weights in place, kept blocks of 128 channels",
        }.get(row["execution"], "")
        numbers = [f"{row['wall_seconds']:.1f} s", f"{row['speedup_wall']:.2f}×"]
        # By 0 and 1 everything is computed: there is no bound to come near.
        bound = "-" if row["execution"] == "mask" else f"{row['bound']:.2f}×"
        body.append([name, *_kept(row), *numbers, bound])
    header = ("one step", "heads kept", "channels kept", "time", "speed-up", "FLOP bound")
    table = markdown(header, body, sides(1, 5))
    tokens = dense["rows"] * dense["row_length"]
    device = Record(dense).device
    return f"{table}\n\n{dense['model']}; {tokens:,} tokens; {dense['dtype']}; {device}."


def memory(rows: Sequence[Row]) -> str:
    """What `scripts.memory` found, a table a model."""

    def line(row: Row, together: Sequence[Row]) -> list[str]:
        whole = sum(together[0][name] for name in MEMORY)
        here = sum(row[name] for name in MEMORY)
        gibibytes = [f"{count / 2**30:.1f} GiB" for count in (*(row[k] for k in MEMORY), here)]
        refresh = row.get("refresh_bytes")
        moment = f"{refresh / 2**30:.1f} GiB" if refresh else "-"
        return [*gibibytes, f"{here / whole:.2f}×", moment]

    header = ("state", "resting", "temporaries", "in all", "beside dense", "at a refresh")
    return _by_setting(rows, header, line)


def speed(rows: Sequence[Row]) -> str:
    """What `scripts.efficiency` measured, a table a model.

    The second bound takes what a step without neurons takes as given. MFU: FLOPs of the model that
    is trained, none twice, by the rate of the device's own matrix products.
    """

    def line(row: Row, together: Sequence[Row]) -> list[str]:
        found = {(one["part"], one["execution"], one["rate"]): one for one in together}
        dense, peak = together[0]["seconds"], found.get(("peak", "dense", 0.0))
        seconds = row["seconds"]
        busy = row["model_flops"] / seconds
        alone = found.get(("optimizer", row["execution"], row["rate"]), {})
        second = second_bound(row, together[0], found.get(("step", "gather", 1.0)))
        return [
            f"{seconds * 1e3:,.1f} ms",
            f"{row['rows'] * row['row_length'] / seconds:,.0f}",
            percent(busy * peak["seconds"] / peak["model_flops"]) if peak else "-",
            f"{dense / seconds:.2f}×",
            f"{row['bound']:.2f}×",
            percent(dense / seconds / row["bound"]),
            f"{second:.2f}×" if second else "-",
            f"{alone['seconds'] * 1e3:,.1f} ms" if "seconds" in alone else "-",
            f"{sum(row[name] for name in MEMORY) / 2**30:.1f} GiB",
            f"{row['compile_seconds']:.0f} s",
        ]

    speeds = ("time", "tokens/s", "MFU", "speed-up", "FLOP bound", "of it", "second bound")
    return _by_setting(rows, (*speeds, "optimizer", "memory", "compiling"), line)


def second_bound(row: Row, dense: Row, empty: Row | None) -> float | None:
    """The speed-up if of the dense step's seconds those of neurons alone shrink with FLOPs."""
    if empty is None or "seconds" not in empty:
        return None
    share = (1 / row["bound"] - 1 / empty["bound"]) / (1 - 1 / empty["bound"])
    neurons: float = dense["seconds"] - empty["seconds"]
    bound: float = dense["seconds"] / (empty["seconds"] + share * neurons)
    return bound


def kernels(rows: Sequence[Row]) -> str:
    """What `kernels.benchmark` measured of the kernels, a table for each program, model and block.

    `of dense rate`: FLOPs a second of what is kept by those of the dense product (on GPUs cuBLAS's,
    through XLA). Beside XLA's gather and PyTorch's block-sparse product, above 1× is faster.
    """
    found = {_product(row): row for row in rows if "implementation" in row}

    def beside(row: Row, name: str, **case: Any) -> float | None:
        other = found.get(_product({**row, "implementation": name, **case}), {})
        return (
            other["seconds"] / row["seconds"] if {"seconds"} <= other.keys() & row.keys() else None
        )

    def line(row: Row) -> list[str]:
        first = [f"{row['tokens']:,}", percent(row["density"])]
        if "seconds" not in row:
            return [*first, row["error"], *[""] * 6]
        dense = beside(row, "dense", density=1.0, block=None)
        rivals = [beside(row, "xla"), beside(row, "torch_bsr")]
        return [
            *first,
            f"{row['seconds'] * 1e3:,.3f} ms",
            f"{row['flops'] / row['seconds'] / 1e12:,.0f}",
            percent(dense * row["density"]) if dense else "-",
            f"{dense:.2f}×" if dense else "-",
            f"{1 / row['density']:.2f}×",
            *(f"{rival:.2f}×" if rival else "-" for rival in rivals),
        ]

    header = ("tokens", "density", "time", "TFLOP/s", "of dense rate", "beside dense", "bound")
    ours = [row for row in found.values() if row["implementation"].startswith("pallas")]
    parts = []
    for name in dict.fromkeys(map(_table_of, ours)):
        together = sorted(
            (row for row in ours if _table_of(row) == name),
            key=lambda row: (row["tokens"], row["density"]),
        )
        body = [line(row) for row in together]
        titles = (*header, "beside XLA", "beside PyTorch")
        parts += [markdown(titles, body, sides(0, len(titles))), f"{'; '.join(name)}."]
    if not parts:
        raise UserError("no kernel among the rows")
    return "\n\n".join(parts)


def _product(row: Row) -> tuple[Any, ...]:
    """What is measured once."""
    case = ("model", "program", "tokens", "density", "block", "implementation")
    return row["device"]["kind"], *(row[name] for name in case)


def _table_of(row: Row) -> tuple[str, ...]:
    block = f"blocks of {row['block']}"
    return row["program"], row["model"], block, row["implementation"], row["device"]["kind"]


TABLES: dict[str, Callable[[Sequence[Row]], str]] = {
    "kernels": kernels,
    "steps": steps,
    "memory": memory,
    "speed": speed,
}


def _by_setting(
    rows: Sequence[Row], header: tuple[str, ...], line: Callable[[Row, Sequence[Row]], list[str]]
) -> str:
    """A table for each setting, with what names it; `line` makes the rest of a row's line, beside
    all of its setting, the dense step first. Raises `UserError` where there is none."""
    parts = []
    for together in settings(rows):
        dense = together[0]
        failed = "not compared: the dense step failed" if "error" in dense else ""
        body = [
            [trained(row), row.get("error", failed)]
            if failed or "error" in row
            else [trained(row), *_kept(row), *line(row, together)]
            for row in together
            if row["part"] == "step" and row["rate"] < 1
        ]
        body = [cells + [""] * (3 + len(header) - len(cells)) for cells in body]
        first = ("trained", "heads kept", "channels kept")
        named = [setting_of(dense), dense["dtype"], dense["optimizer"], f"remat {dense['remat']}"]
        named += [f"kernels {dense['kernels']}"] if dense["kernels"] else []
        named += [dense["target"]]
        parts.append(markdown((*first, *header), body, sides(1, 2 + len(header))))
        parts.append(f"{'; '.join(named)}.")
    return "\n\n".join(parts)


def settings(rows: Sequence[Row]) -> Iterator[list[Row]]:
    """The newest rows of each setting, the dense step first. Raises `UserError` where there is
    none."""
    key = (*STEP_SETTING, "part", "execution", "rate")
    newest = {tuple(row[name] for name in key): row for row in rows}
    for setting in dict.fromkeys(known[: len(STEP_SETTING)] for known in newest):
        together = [row for known, row in newest.items() if known[: len(setting)] == setting]
        together.sort(key=lambda row: (row["part"] != "step", row["execution"] != "dense"))
        dense = together[0]
        if (dense["part"], dense["execution"]) != ("step", "dense"):
            raise UserError(f"no dense step among the rows of {dense['model']}")
        yield together


def setting_of(row: Row) -> str:
    """Model and tokens."""
    tokens = f"{row['rows'] * row['row_length']:,} tokens"
    return f"{row['model']}; {tokens} in rows of {row['row_length']:,}"


def trained(row: Row) -> str:
    """What a step trains."""
    if row["execution"] == "dense":
        return "dense"
    return f"r = {row['rate']:g}, {row['execution']}"


def _kept(row: Row) -> list[str]:
    return [percent(row["kept_heads"]), percent(row["kept_channels"])]
