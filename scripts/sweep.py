"""Train the unfinished runs of a sweep, on this machine or on Slurm.

  python -m scripts.sweep --config=experiments/tiny.py --axis sparsity.rate=0,0.25,0.5 --seeds 3 \\
      --workdir=runs/rates --workers 2
  python -m scripts.sweep --config=experiments/tinyllama_cpt.py --config.data.sources=TEXT \\
      --axis sparsity.metric=wanda,output --axis 'sparsity.dense_layers=;0;0,1' \\
      --workdir=runs/metrics --launcher slurm --slurm partition=gpu,time=720,gpus_per_node=1

Every combination of the axes is a run. Its work directory, as of scripts.train, is named by a
fingerprint of its settings. The first seed of all combinations runs first. The same command, also
with more axes, skips finished runs and continues the others. A failing run does not stop the
others. After Ctrl-C local runs save after their current step; jobs of a cluster continue, and the
same command monitors them. --config.NAME=VALUE is a setting of all runs; `python -m scripts.train
--help` lists them.
"""

import sys
from argparse import Namespace
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from sat_jax.cli import Parser, run
from sat_jax.errors import UserError

_PREFIX = "--config."


def parser() -> Parser:
    """Return the parser of the command line without --config.NAME=VALUE."""
    parser = Parser("sweep", __doc__)
    add = parser.add_argument
    add("--config", required=True, metavar="FILE[:VARIANT]",
        help="an experiment file; its get_sweep(), if it has one, returns the runs")  # fmt: skip
    add("--axis", action="append", default=[], metavar="NAME=VALUE,...",
        help="a setting and its values; ';' separates values that contain commas")  # fmt: skip
    add("--seeds", type=int, metavar="N", help="each run with the seeds 0 to N-1")
    add("--workdir", required=True, type=Path, metavar="DIR", help="folder of the sweep")
    add(
        "--dry-run", action="store_true", help="print the runs and their cost without starting them"
    )
    add("--flops-per-second", type=float, metavar="X",
        help="speed for the times of --dry-run; default: that of the finished runs")  # fmt: skip
    add("--skip-invalid", action="store_true", help="skip invalid runs")
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
    from sat_jax.results.planned import dry_run, prepare_all
    from sat_jax.results.record import record_run, row_of
    from sat_jax.results.rows import ORIGIN, check
    from sat_jax.results.runner import SweepDir, run_sweep
    from sat_jax.results.tables import terminal_table
    from sat_jax.results.watch import State
    from sat_jax.train.metrics import read_metrics

    runs, comparisons = _runs(options, overrides)
    folder = SweepDir(options.workdir)
    if options.dry_run:
        summaries = {run.name: folder.watch(run).workdir.finished() for run in runs}
        finished_runs = {name: summary for name, summary in summaries.items() if summary}
        print(dry_run(runs, finished_runs, options.flops_per_second))
        return
    if options.record is not None:
        check(options.record)
    results: list[FinishedRun] = []

    def finished(run: Any, summary: dict[str, Any]) -> None:
        records = read_metrics(folder.watch(run).workdir.metrics)
        row = row_of(options.config, run.config, summary, records)
        results.append(FinishedRun(row | {name: summary[name] for name in ORIGIN}))
        if options.record is not None:
            record_run(options.record, options.config, run.config, summary, records)

    with ExitStack() as stack:
        folder.lock(stack)
        launcher = _launcher(options, folder)
        data, invalid = prepare_all(runs, lambda line: print(line, file=sys.stderr))
        runs = _valid(runs, invalid, options)
        watched = [folder.watch(run) for run in runs]
        for watched_run in watched:
            watched_run.check_finished(data[watched_run.run.name])
        folder.add(sys.argv[1:], runs, comparisons)
        run_sweep(folder, watched, launcher, finished)
    if results:
        print(terminal_table(results))
    failed = [watched_run for watched_run in watched if watched_run.state is State.FAILED]
    for failure in failed:
        line = f"failed: {failure.run.name}: {failure.error} (log: {failure.log})"
        print(line, file=sys.stderr)
    if failed:
        raise UserError(f"{len(failed)} of {len(runs)} runs failed; the same command tries again")


def _check(options: Namespace) -> None:
    """Check the options that need no other module."""
    for name in ("seeds", "workers", "flops_per_second"):
        value = getattr(options, name)
        if value is not None and not value > 0:
            raise UserError(f"--{name.replace('_', '-')} {value}; accepted: more than 0")
    if options.launcher != "slurm" and options.slurm:
        raise UserError("--slurm needs --launcher slurm")
    if options.launcher != "local" and options.gpus:
        raise UserError("--gpus needs --launcher local; on Slurm: --slurm gpus_per_node=N")


def _runs(options: Namespace, overrides: Sequence[str]) -> tuple[list[Any], Any]:
    """Return the valid runs and the declared comparisons."""
    from sat_jax.config_values import experiment
    from sat_jax.results.planned import plan_runs
    from sat_jax.results.sweep import check_runs, combine, comparison_of, parse_axes, sweep_of

    values = experiment(options.config)
    axes = parse_axes(options.axis)
    sweep = sweep_of(options.config)
    listed = None
    if sweep is not None:
        listed = check_runs(sweep.runs, f"get_sweep() of {options.config}")
    fixed, settings = combine(overrides, axes, listed, options.seeds)
    runs, invalid = plan_runs(values, fixed, settings)
    declared = sweep.comparisons if sweep is not None else ()
    if axes or not declared:
        declared = (*declared, comparison_of(settings))
    return _valid(runs, invalid, options), declared


def _valid(runs: Sequence[Any], invalid: Sequence[Any], options: Namespace) -> list[Any]:
    """Return the valid runs and print why others are invalid. Raises `UserError` for invalid runs
    without --skip-invalid."""
    from sat_jax.results.sweep import settings_text

    for settings, reason in invalid:
        print(f"invalid: {settings_text(settings)}: {reason}", file=sys.stderr)
    refused = [settings for settings, _ in invalid]
    valid = [run for run in runs if run.settings not in refused]
    if invalid and not (options.skip_invalid and valid):
        advice = "; --skip-invalid skips them" if valid else ""
        raise UserError(f"{len(invalid)} runs are invalid, nothing was started{advice}")
    if invalid:
        print(f"skipped: {len(invalid)} invalid runs", file=sys.stderr)
    return valid


def _launcher(options: Namespace, folder: Any) -> Any:
    from sat_jax.results.launch import Local, Slurm, slurm_options

    if options.launcher == "slurm":
        return Slurm(folder.logs, slurm_options(options.slurm), options.workers)
    ids = options.gpus.split(",") if options.gpus else []
    if not all(part.isdecimal() for part in ids):
        raise UserError(f"--gpus {options.gpus}; accepted: CUDA device numbers, as in 0,1,2,3")
    return Local(folder.logs, options.workers or 1, [int(part) for part in ids])


if __name__ == "__main__":
    run(main)
