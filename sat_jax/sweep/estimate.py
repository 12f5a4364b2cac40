"""What a sweep will cost, told before it starts: FLOPs from shapes, seconds from measured speed."""

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sat_jax.analysis.rows import latest, read
from sat_jax.analysis.tables import duration, fixed_width, quantity, sides
from sat_jax.models.build import layout_of
from sat_jax.models.presets import preset
from sat_jax.sparsity.controller import Rung
from sat_jax.sparsity.flops import training_flops
from sat_jax.sparsity.importance import METRICS
from sat_jax.sweep.axes import short_names, told
from sat_jax.sweep.runs import Run
from sat_jax.train.costs import flops_of_probe, flops_of_selection, step_flops


@dataclasses.dataclass(frozen=True)
class Cost:
    """Training FLOPs of a run whose rows are full: the most it can be. `spent` has the probes."""

    dense: float
    spent: float


@dataclasses.dataclass(frozen=True)
class Speed:
    """FLOPs a second of a whole run, everything counted, and where that is known from."""

    flops_per_second: float
    source: str


def cost_of(run: Run) -> Cost:
    """What `run` costs, and what the same tokens cost densely."""
    config, model = run.config, run.model
    length = config.data.row_length
    tokens_a_step = config.train.rows_per_step * length
    spent = probes_of(run) * flops_of_probe(config, model)
    for rung in run.controller.rungs:
        spent += (rung.stop - rung.start) * tokens_a_step * step_flops(config, model, rung)
        spent += selections_of(run, rung) * flops_of_selection(config, model, rung)
    return Cost(config.train.steps * tokens_a_step * step_flops(config, model), spent)


def probes_of(run: Run) -> int:
    """How many refreshes look with a probe: all of them, or the first alone at inputs. Layers that
    choose for themselves need none."""
    controller, metric = run.controller, METRICS[run.config.sparsity.metric]
    if not controller.sparse or not metric.needs or controller.refresh_every == 0:
        return 0
    if not metric.probes:
        return 1
    return sum(selections_of(run, rung) for rung in controller.rungs)


def selections_of(run: Run, rung: Rung) -> int:
    """How often neurons are chosen between the steps of a rung."""
    controller = run.controller
    if controller.refresh_every == 0 or controller.neurons.is_dense(rung.plan):
        return 0
    return math.ceil((rung.stop - rung.start) / controller.refresh_every)


def speed_of(
    summaries: Sequence[Mapping[str, Any]], runs: Sequence[Run], rows: Path
) -> Speed | None:
    """The speed of runs that have finished in this sweep; else of a step of the benchmark (`rows`)
    in the runs' dtype, on their model if there is one; None where there is neither."""
    if summaries:
        speeds = [one["spent_flops"] / one["seconds"]["total"] for one in summaries]
        return Speed(statistics.median(speeds), f"{len(speeds)} finished of this sweep")
    wanted = {"benchmark": "steps", "execution": "dense", "dtype": runs[0].config.model.dtype}
    known = read(rows) if rows.exists() else []
    name = runs[0].config.model.preset
    row = latest(known, **wanted, model=name) or latest(known, **wanted)
    if row is None:
        return None
    flops = training_flops(
        layout_of(preset(row["model"])), row["row_length"], remat=row["remat"]
    ).total
    source = (
        f"the benchmark's dense step of {row['model']} in {row['dtype']} on"
        f" {row['device']['kind']}; other machines, models and shapes"
        " differ, and compiling and evaluating come on top"
    )
    return Speed(flops * row["rows"] * row["row_length"] / row["wall_seconds"], source)


def dry_run(runs: Sequence[Run], finished: Sequence[str], speed: Speed | None) -> str:
    """A table of the runs with what they cost, and the sum of those left to do."""
    short = short_names(path for run in runs for path in run.settings)
    costs = {run.name: cost_of(run) for run in runs}
    body = []
    for run in runs:
        cost = costs[run.name]
        left = "finished" if run.name in finished else _time(cost.spent, speed)
        body.append(
            [
                run.name,
                told(run.settings, short),
                quantity(cost.dense, "FLOP"),
                quantity(cost.spent, "FLOP"),
                f"{cost.dense / cost.spent:.2f}x",
                left,
            ]
        )
    header = ("run", "settings", "dense", "spent", "bound", "time")
    table = fixed_width(header, body, sides(2, 4))
    todo = sum(costs[run.name].spent for run in runs if run.name not in finished)
    lines = [
        f"{len(runs)} runs, {len(runs) - len(finished)} to do: at most {quantity(todo, 'FLOP')},"
        f" {_time(todo, speed)} one after another"
    ]
    if speed is None:
        lines.append("Time: not known; give --flops-per-second")
    else:
        lines.append(f"Time: at {quantity(speed.flops_per_second, 'FLOP/s')}, from {speed.source}")
    return "\n".join([table, "", *lines])


def _time(flops: float, speed: Speed | None) -> str:
    return "-" if speed is None else duration(flops / speed.flops_per_second)
