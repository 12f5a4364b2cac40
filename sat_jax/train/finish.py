"""The outputs of a finished run: figures and `summary.json`."""

import dataclasses
import statistics
from collections.abc import Mapping
from typing import Any

from sat_jax.nn.loss import perplexity_of
from sat_jax.results.run_plots import Kept, exchange_figure, kept_figure, loss_figure, save
from sat_jax.sparsity.plan import Plan, has_channels, kept_shares
from sat_jax.train.costs import (
    flops_of_block_gradients,
    flops_of_probe,
    flops_of_selection,
    step_flops,
    teacher_flops,
)
from sat_jax.train.counters import RunCounters
from sat_jax.train.export import writes_adapter, writes_quantized
from sat_jax.train.metrics import MetricsLog, read_metrics
from sat_jax.train.setup import Task
from sat_jax.train.speed import Speedup
from sat_jax.train.summary import PhaseTimer, write_summary
from sat_jax.train.workdir import WorkDir


def finish(
    task: Task,
    workdir: WorkDir,
    counters: RunCounters,
    metrics: MetricsLog,
    clock: PhaseTimer,
    speedups: Mapping[Plan, Speedup] | None,
) -> None:
    """Write what is left of a run, last its summary, which marks it as finished.

    `speedups` are those that were measured; None: measuring is switched off. A run that was
    interrupted in here does all of it again.
    """
    metrics.flush()
    records = read_metrics(workdir.metrics)
    rungs = rung_summaries(task, counters, records, speedups)
    figures = _draw(workdir, task, counters, records)
    evaluations = [r["eval_loss"] for r in records if "eval_loss" in r]
    losses = [r["loss"] for r in records if "loss" in r]
    spent, dense = flops_of_run(task, counters)
    write_summary(
        workdir,
        steps=task.config.train.steps,
        tokens=counters.tokens,
        losses={"loss": losses[-1], "eval_loss": evaluations[-1]},
        dense_flops=dense,
        spent_flops=spent,
        seconds=clock.seconds(),
        more={
            "perplexity_before": perplexity_of(evaluations[0]),
            "perplexity_after": perplexity_of(evaluations[-1]),
            "rungs": rungs,
            "selections": counters.selections,
            "probes": counters.probes,
            "compile_seconds": counters.compile_seconds,
            "first_step_seconds": counters.first_step_seconds,
            "loss_tokens": counters.loss_tokens,
            "teacher_flops": counters.tokens * teacher_flops(task.config, task.teacher_model),
            "data": task.data.info.fingerprint,
            "prepared": dataclasses.asdict(task.data.info),
            "figures": figures,
            "export": str(workdir.export) if task.config.export.huggingface else None,
            "adapter": str(workdir.adapter) if writes_adapter(task.config) else None,
            "quantized": str(workdir.quantized) if writes_quantized(task.config) else None,
        },
    )


def rung_summaries(
    task: Task,
    counters: RunCounters,
    records: list[dict[str, Any]],
    speedups: Mapping[Plan, Speedup] | None,
) -> list[dict[str, Any]]:
    """Return a mapping per rung, for `results.run_table.end_of_run`."""
    model, config, controller = task.model, task.config, task.controller
    teacher = task.teacher_model
    dense_flops = step_flops(config, model, teacher=teacher)
    summaries = []
    for number, rung in enumerate(controller.rungs):
        speeds = [
            r["tokens_per_second"] for r in records if r.get("rung") == number and r["steady"]
        ]
        heads, channels = kept_shares(rung.plan, controller.neurons)
        summaries.append(
            {
                "omission_rate": rung.rate,
                "kept_heads": heads,
                "kept_channels": channels,
                "stored_blocks": rung.plan.stored_share,
                "dropped_branches": rung.plan.dropped_share,
                "omitted_tokens": rung.plan.token_rate,
                "skipped_tokens": rung.plan.token_skip_rate,
                "steps": rung.stop - rung.start,
                "tokens": counters.rung_tokens[number],
                "steps_timed": len(speeds),
                "tokens_per_second": statistics.median(speeds) if speeds else None,
                "bound": dense_flops / step_flops(config, model, rung, teacher),
            }
        )
        if speedups is not None:
            measured = speedups.get(rung.plan)
            summaries[-1] |= measured._asdict() if measured else dict.fromkeys(Speedup._fields)
    return summaries


def flops_of_run(task: Task, counters: RunCounters) -> tuple[float, float]:
    """Return the training FLOPs, with probes, selections and the forward pass of a teacher, and
    those of the dense baseline with the same teacher."""
    config, teacher = task.config, task.teacher_model
    spent = counters.probes * flops_of_probe(config, task.model)
    done = zip(counters.rung_tokens, counters.rung_selections, strict=True)
    for rung, (tokens, selections) in zip(task.controller.rungs, done, strict=True):
        spent += tokens * step_flops(config, task.model, rung, teacher)
        spent += selections * flops_of_selection(config, task.model, rung)
    for number, rung in enumerate(task.controller.rungs):
        times = task.controller.block_gradients(number)
        spent += times * flops_of_block_gradients(config, task.model, rung) if times else 0.0
    return spent, counters.tokens * step_flops(config, task.model, teacher=teacher)


def _draw(
    workdir: WorkDir,
    task: Task,
    counters: RunCounters,
    records: list[dict[str, Any]],
) -> list[str]:
    folder = workdir.path / "figures"
    folder.mkdir(exist_ok=True)
    figures = [save(loss_figure(records), folder / "loss.png")]
    if any("blocks_exchanged" in record for record in records):
        figures.append(save(exchange_figure(records), folder / "exchanged.png"))
    if counters.selections:
        branches = task.controller.neurons.branches
        heads, channels = (
            next(counters.kept[n] for n, units in branches.items() if has_channels(units) == mlp)
            for mlp in (False, True)
        )
        times, head_unit = heads["times"], "head"
        if times.ndim == 3:  # in groups
            by_group = task.config.sparsity.attention_unit == "kv_group"
            times = times.max(axis=2) if by_group else times.reshape(len(times), -1)
            head_unit = "KV group" if by_group else "query head"
        figure = kept_figure(
            Kept(times, heads["of"]),
            Kept(channels["times"], channels["of"]),
            head_unit=head_unit,
        )
        figures.append(save(figure, folder / "kept.png"))
    return [str(path) for path in figures]
