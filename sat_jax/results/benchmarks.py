"""Tables of benchmarks, which time or compile single steps."""

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence

from sat_jax.analysis.devices import Device
from sat_jax.analysis.operators import Setting
from sat_jax.analysis.roofline import mlp_seconds
from sat_jax.errors import UserError
from sat_jax.results.rows import STEP_SETTING, Row, device_name, latest
from sat_jax.results.speed import speedup_text
from sat_jax.results.tables import Table
from sat_jax.results.text import percent

_MEMORY = {
    "state": "state_bytes",
    "omitted state": "resting_bytes",
    "temporaries": "temporary_bytes",
}

_PRODUCTS_OF = {"sat_jax": "XLA", "transformers": "torch"}


def steps_table(rows: Sequence[Row]) -> list[Table]:
    """Return the last measurement of `scripts.benchmark --only steps` beside the dense step."""
    dense = latest(rows, benchmark="steps", execution="dense")
    if dense is None:
        return []
    body = []
    for row in rows:
        if row.get("benchmark") != "steps" or row["date"] != dense["date"]:
            continue
        name = _trained(row)
        if row.get("dense_tokens"):
            name += f", {percent(row['dense_tokens'])} of the tokens with all channels"
        # Mask execution computes everything, so that it has no bound.
        bound = None if row["execution"] == "mask" else row["bound"]
        speedup = [speedup_text(row["speedup_wall"], bound), f"{bound:.2f}×" if bound else "-"]
        body.append((name, *_kept(row), f"{row['wall_seconds']:.1f} s", *speedup))
    header = ("one step", "heads kept", "channels kept", "time", "speed-up", "FLOP bound")
    return [Table("steps", "Single steps", _setting(dense), header, tuple(body))]


def peer_tables(rows: Sequence[Row]) -> list[Table]:
    """Return the last measurement of `scripts.benchmark --only peer` of each size and dtype."""
    settings = defaultdict[tuple[str, str], dict[tuple[str, str], Row]](dict)
    for row in rows:
        if row.get("benchmark") == "peer":
            work = row.get("work", "step")  # the oldest rows are of steps alone
            settings[_model_and_tokens(row), row["dtype"]][work, row["library"]] = row
    header = ("work", "library", "time", "speed", "by CPU time")
    tables = []
    for works in settings.values():
        body = [
            (
                {"step": "dense step", "products": "products of a layer"}[work],
                _PRODUCTS_OF[library] if work == "products" else library,
                f"{row['wall_seconds']:.2f} s",
                f"{row['speed_against_transformers_wall']:.2f}×",
                f"{row['speed_against_transformers_cpu']:.2f}×",
            )
            for (work, library), row in works.items()
        ]
        setting = _setting(works["step", "sat_jax"])
        tables.append(Table("peer", "Dense steps", setting, header, tuple(body)))
    return tables


def blocks_table(rows: Sequence[Row]) -> list[Table]:
    """Return the last measurement of `scripts.benchmark --only blocks`, with speed-ups over dense
    products in the same turns."""
    dense = latest(rows, benchmark="blocks", library="dense")
    if dense is None:
        return []
    names = {"mlp": "MLP with gradients", "product": "product"}
    some = [r for r in rows if r.get("benchmark") == "blocks" and r["date"] == dense["date"]]
    predicted = _predicted_speedups(some)
    body = [
        (
            names[row["work"]],
            str(row["block"]),
            f"{row['density'] * 100:g} %",
            row["library"],
            f"{row['wall_seconds'] * 1000:.0f} ms",
            f"{row['speedup_wall']:.2f}×",
            f"{row['speedup_cpu']:.2f}×",
            predicted.get((row["work"], row["block"], row["density"]), "-"),
            f"{1 / row['density']:.0f}×",
        )
        for row in some
        if row.get("library", "dense") != "dense"
    ]
    body.sort(key=lambda cells: cells[0])
    header = ("work", "block", "stored", "library", "time", "speed-up", "by CPU time",
              "roofline, fused", "FLOP bound")  # fmt: skip
    caption = f"Matrices {_setting(dense)}"
    return [Table("blocks", "Block-sparse products", caption, header, tuple(body))]


def _predicted_speedups(rows: Sequence[Row]) -> dict[tuple[str, int, float], str]:
    """Return the speed-ups of MLPs that the roofline gives, kernel by kernel and fused, by work,
    block and density. The peak is the FLOP/s of the dense MLP, the bandwidth that of a copy."""
    copy = next((row for row in rows if row["work"] == "copy"), None)
    if copy is None:
        return {}
    bandwidth = 2 * copy["bytes"] / copy["wall_seconds"]
    result = {}
    for row in rows:
        if row["work"] == "mlp" and row["library"] == "dense":
            channels, width = map(int, row["model"].split("x"))
            tokens, length = row["rows"] * row["row_length"], row["row_length"]
            peak = 12 * tokens * channels * width / row["wall_seconds"]
            device = Device("this machine", peak, bandwidth, math.inf, math.inf, {})
            seconds = []
            for sparsity in (0.0, 1 - row["density"]):
                setting = Setting(tokens, length, sparsity, row["block"], 4)
                seconds.append(mlp_seconds(width, channels, setting, device))
            speedups = [dense / sparse for dense, sparse in zip(*seconds, strict=True)]
            result["mlp", row["block"], row["density"]] = "{:.1f}×, {:.1f}×".format(*speedups)
    return result


def moves_table(rows: Sequence[Row]) -> list[Table]:
    """Return the last measurement of `scripts.benchmark --only moves`: the parts of a refresh."""
    step = latest(rows, benchmark="moves", move="step")
    if step is None:
        return []
    body = [
        (row["move"], f"{row['wall_seconds']:.2f} s", f"{row['share_of_a_step']:.3f}")
        for row in rows
        if row.get("benchmark") == "moves" and row["date"] == step["date"]
    ]
    caption = f"r = {step['rate']:g}, gather; {_setting(step)}"
    header = ("part", "time", "of a step")
    return [Table("moves", "Parts of a refresh", caption, header, tuple(body))]


def memory_tables(rows: Sequence[Row]) -> list[Table]:
    """Return what `scripts.memory` compiled, a table for each setting."""
    header = ("trained", "heads kept", "channels kept", *_MEMORY, "total", "of dense",
              "at a refresh")  # fmt: skip
    tables = []
    for steps in _settings(rows):
        dense, body = steps[0], []
        dense_total = sum(dense[field] for field in _MEMORY.values())
        for row in steps:
            sizes = [row[field] for field in _MEMORY.values()]
            cells = [*map(_gibibytes, (*sizes, sum(sizes))), f"{sum(sizes) / dense_total:.2f}×"]
            cells.append(_gibibytes(row["refresh_bytes"]) if row.get("refresh_bytes") else "-")
            body.append((_trained(row), *_kept(row), *cells))
        settings = [dense["dtype"], dense["optimizer"], f"remat {dense['remat']}"]
        settings += [f"kernels {dense['kernels']}"] if dense["kernels"] else []
        caption = "; ".join([_model_and_tokens(dense), *settings, dense["target"]])
        tables.append(Table("memory", "Memory of a step", caption, header, tuple(body)))
    return tables


def _settings(rows: Sequence[Row]) -> Iterator[list[Row]]:
    """Yield the newest steps of each setting, the dense one first."""
    newest = {
        (tuple(row.get(name) for name in STEP_SETTING), row["execution"], row["rate"]): row
        for row in rows
        if row.get("part") == "step" and row["rate"] < 1 and "error" not in row
    }
    for setting in dict.fromkeys(key[0] for key in newest):
        steps = [row for key, row in newest.items() if key[0] == setting]
        steps.sort(key=lambda row: row["execution"] != "dense")
        if steps[0]["execution"] != "dense":
            raise UserError(f"no dense step among the rows of {steps[0]['model']}")
        yield steps


def _setting(row: Row) -> str:
    return f"{_model_and_tokens(row)}; {row['dtype']}; {device_name(row['device'])}"


def _model_and_tokens(row: Row) -> str:
    tokens = f"{row['rows'] * row['row_length']:,} tokens"
    return f"{row['model']}; {tokens} in rows of {row['row_length']:,}"


def _trained(row: Row) -> str:
    return "dense" if row["execution"] == "dense" else f"r = {row['rate']:g}, {row['execution']}"


def _kept(row: Row) -> list[str]:
    return [percent(row["kept_heads"]), percent(row["kept_channels"])]


def _gibibytes(count: int) -> str:
    return f"{count / 2**30:.1f} GiB"
