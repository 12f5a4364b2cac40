"""Train the unfinished runs of a sweep, on this machine or on Slurm.

  python -m scripts.sweep --config=experiments/tiny.py --axis sparsity.rate=0,0.25,0.5 --seeds 3 \\
      --workdir=runs/rates --workers 2
  python -m scripts.sweep --config=experiments/tinyllama_cpt.py --config.data.sources=TEXT \\
      --axis sparsity.metric=wanda,output --axis 'sparsity.dense_layers=;0;0,1' \\
      --workdir=runs/metrics --launcher slurm --slurm partition=gpu,time=720,gpus_per_node=1
  python -m scripts.sweep --config=experiments/table_passes.py:smoke --config.data.sources=TEXT \\
      --halving 3 --workdir=runs/search

Every combination of the axes is a run of scripts.train. The name of its work directory is a
fingerprint of its settings. The first seed of all combinations runs first. The same command, also
with more axes, skips finished runs and continues the others. A failing run does not stop the
others. After Ctrl-C, local runs save a checkpoint after their current step; Slurm jobs continue,
and the same command monitors them again. --config.NAME=VALUE is a setting of all runs;
`python -m scripts.train --help` lists them.

--halving N trains all runs on 1 / 2^(N-1) of their steps, then the better half on twice as many,
until round N has train.steps. Each round trains anew, with a learning rate that decays to its own
last step. Dense runs take part in every round.
"""

import sys
from argparse import Namespace
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sat_jax.cli import Parser, run
from sat_jax.errors import UserError

if TYPE_CHECKING:
    from sat_jax.results.halving import Round
    from sat_jax.results.launch import Launcher
    from sat_jax.results.planned import PlannedRun
    from sat_jax.results.runner import SweepDir, SweepRun
    from sat_jax.results.sweep import Comparison

_PREFIX = "--config."


def parser() -> Parser:
    """Return the parser of the command line without --config.NAME=VALUE."""
    parser = Parser("sweep", __doc__)
    add = parser.add_argument
    add("--config", required=True, metavar="FILE[:VARIANT]",
        help="an experiment file; its get_sweep(), if it has one, returns the runs")  # fmt: skip
    add("--axis", action="append", default=[], metavar="NAME=VALUE,...",
        help="a setting and its values; ';' separates values that contain commas")  # fmt: skip
    add("--seeds", type=int, metavar="N", help="train each run with the seeds 0 to N-1")
    add("--halving", type=int, metavar="N",
        help="rounds of successive halving by held-out perplexity (means over seeds)")  # fmt: skip
    add("--workdir", required=True, type=Path, metavar="DIR", help="folder of the sweep")
    add(
        "--dry-run",
        action="store_true",
        help="print the runs and their FLOPs without starting them",
    )
    add("--launcher", choices=("local", "slurm"), default="local", help="default: local")
    add("--workers", type=int, metavar="N",
        help="simultaneous runs; default: 1, on Slurm its limit. Speed-ups of runs that share a"
        " device are not meaningful")  # fmt: skip
    add("--gpus", metavar="I,J,...", help="local: CUDA devices, shared evenly by the workers")
    add("--slurm", action="append", default=[], metavar="NAME=VALUE,...",
        help="sbatch options; time=MINUTES is required")  # fmt: skip
    add("--record", type=Path, metavar="FILE",
        help="append each finished run to this .jsonl file of rows")  # fmt: skip
    return parser


def main() -> None:
    """Run the sweep and print the table of its runs."""
    overrides = [a.removeprefix(_PREFIX) for a in sys.argv[1:] if a.startswith(_PREFIX)]
    options = parser().parse_args([a for a in sys.argv[1:] if not a.startswith(_PREFIX)])
    _check(options)
    from sat_jax.results.finished import FinishedRun
    from sat_jax.results.halving import halve, plan_table, result_table
    from sat_jax.results.planned import dry_run, prepare_all
    from sat_jax.results.record import finished_row, record_run
    from sat_jax.results.rows import check
    from sat_jax.results.runner import SweepDir, run_sweep
    from sat_jax.results.tables import terminal_table

    runs, rounds, comparisons = _runs(options, overrides)
    folder = SweepDir(options.workdir)
    sweep_runs = {run.name: folder.find(run) for run in runs}
    if options.dry_run:
        print(dry_run(runs, [name for name, run in sweep_runs.items() if run.finished]))
    if rounds:
        print(plan_table(rounds), file=sys.stdout if options.dry_run else sys.stderr)
    if options.dry_run:
        return
    if options.record is not None:
        check(options.record)
    rows: dict[str, dict[str, Any]] = {}

    def finished(run: "SweepRun") -> None:
        rows[run.run.name] = finished_row(run.workdir, options.config)
        if options.record is not None:
            record_run(options.record, rows[run.run.name])

    with ExitStack() as stack:
        folder.lock(stack)
        launcher = _launcher(options, folder)
        data = prepare_all(runs, _log)
        for name, run in sweep_runs.items():
            run.check_finished(data[name])

        def train(runs: Sequence["PlannedRun"]) -> dict[str, float]:
            folder.add(runs, comparisons)
            run_sweep(folder, [sweep_runs[run.name] for run in runs], launcher, finished, _log)
            return {name: FinishedRun(row).perplexity for name, row in rows.items()}

        if rounds:
            print(result_table(halve(rounds, train, _log)))
        else:
            train(runs)
    if rows:
        print(terminal_table([*rows.values()]))
    failed = [run for run in sweep_runs.values() if run.error]
    for run in failed:
        _log(run.text())
    if failed:
        raise UserError(f"{len(failed)} of {len(runs)} runs failed; the same command tries again")


def _log(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _check(options: Namespace) -> None:
    """Check the options that need no other module."""
    for name in ("seeds", "workers"):
        value = getattr(options, name)
        if value is not None and not value > 0:
            raise UserError(f"--{name} {value}; accepted: more than 0")
    if options.launcher != "slurm" and options.slurm:
        raise UserError("--slurm needs --launcher slurm")
    if options.launcher != "local" and options.gpus:
        raise UserError("--gpus needs --launcher local; on Slurm: --slurm gpus_per_node=N")


def _runs(
    options: Namespace, overrides: Sequence[str]
) -> tuple[list["PlannedRun"], list["Round"], Sequence["Comparison"]]:
    """Return the runs, the rounds of successive halving to which they belong, if any, and the
    comparisons for which they are tabulated."""
    from sat_jax.config_values import experiment
    from sat_jax.results.halving import plan_rounds
    from sat_jax.results.planned import plan_runs
    from sat_jax.results.sweep import combine, comparison_of, parse_axes, sweep_of

    values = experiment(options.config)
    axes = parse_axes(options.axis)
    sweep = sweep_of(options.config)
    fixed, settings = combine(overrides, axes, sweep.runs if sweep else None, options.seeds)
    declared = sweep.comparisons if sweep else ()
    if axes or not declared:
        declared = (*declared, comparison_of(settings))
    if options.halving is None:
        return plan_runs(values, fixed, settings), [], declared
    rounds = plan_rounds(values, fixed, settings, options.halving)
    runs = {run.name: run for this in rounds for run in this.runs(this.variants)}
    return [*runs.values()], rounds, declared


def _launcher(options: Namespace, folder: "SweepDir") -> "Launcher":
    from sat_jax.results.launch import Local, Slurm, slurm_options

    if options.launcher == "slurm":
        return Slurm(folder.path, slurm_options(options.slurm), options.workers)
    ids = options.gpus.split(",") if options.gpus else []
    if not all(part.isdecimal() for part in ids) or len(set(ids)) < len(ids):
        raise UserError(f"--gpus {options.gpus}; accepted: CUDA device numbers, as in 0,1,2,3")
    return Local(options.workers or 1, ids)


if __name__ == "__main__":
    run(main)
