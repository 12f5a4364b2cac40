"""Trains the runs of a sweep that are not finished yet, on this machine or on Slurm.

  python -m scripts.sweep --config=experiments/tiny.py --axis sparsity.rate=0,0.25,0.5 --seeds 3 \\
      --workdir=runs/rates --workers 2
  python -m scripts.sweep --config=experiments/tinyllama_cpt.py --config.data.sources=TEXT \\
      --axis sparsity.metric=wanda,output --axis 'sparsity.dense_layers=;0;0,1' \\
      --workdir=runs/metrics --launcher slurm --slurm partition=gpu,time=720,gpus_per_node=1

Every combination of the axes is a run, an ordinary work directory of scripts.train under its
fingerprint. The first seed of all combinations comes first. The same command, or a larger one,
skips what is finished and continues the rest. A run that fails stops no other one. Ctrl-C ends runs
of this machine after their step, saved; jobs of a cluster go on, and the same command watches them.
--config.NAME=VALUE is a setting of all runs; `python -m scripts.train --help` lists them.
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
_BENCHMARK = Path(__file__).resolve().parents[1] / "experiments" / "results" / "benchmark.jsonl"


def parser() -> Parser:
    """What the command line takes besides settings of all runs."""
    made = Parser("sweep", __doc__)
    add = made.add_argument
    add("--config", required=True, metavar="FILE[:VARIANT]",
        help="an experiment file; its get_sweep(), if it has one, gives the runs")  # fmt: skip
    add("--axis", action="append", default=[], metavar="NAME=VALUE,...",
        help="a setting and its values; ';' separates values with commas in them")  # fmt: skip
    add("--runs", type=Path, metavar="FILE",
        help="the runs, in place of get_sweep(): .json with a list of {NAME: VALUE} or with one"
        " {NAME: [VALUES]} to cross, .jsonl with a {NAME: VALUE} a line")  # fmt: skip
    add("--seeds", type=int, metavar="N", help="each run with the seeds 0 to N-1")
    add("--workdir", required=True, type=Path, metavar="DIR", help="of the sweep")
    add("--dry-run", action="store_true", help="show the runs and what they cost, start nothing")
    add("--flops-per-second", type=float, metavar="X", help="speed to reckon the time with")
    add("--skip-invalid", action="store_true", help="leave out runs that cannot be")
    add("--launcher", choices=("local", "slurm"), default="local", help="default: local")
    add("--workers", type=int, metavar="N",
        help="runs at a time; default: 1, on Slurm its limit. Runs that share a device slow each"
        " other, unevenly: then no speed-up means much")  # fmt: skip
    add("--gpus", metavar="I,J,...", help="local: CUDA devices, shared evenly by the workers")
    add("--slurm", action="append", default=[], metavar="NAME=VALUE,...",
        help="options of sbatch; time=MINUTES has to be one")  # fmt: skip
    add("--record", type=Path, metavar="FILE",
        help="append each finished run to this .jsonl file of rows")  # fmt: skip
    return made


def main() -> None:
    """A sweep from its settings to the table over its runs."""
    overrides = [a.removeprefix(_PREFIX) for a in sys.argv[1:] if a.startswith(_PREFIX)]
    given = parser().parse_args([a for a in sys.argv[1:] if not a.startswith(_PREFIX)])
    _check(given)
    from sat_jax.analysis.results import record_run
    from sat_jax.analysis.rows import check
    from sat_jax.sweep.drive import SweepDir, drive
    from sat_jax.sweep.report import report
    from sat_jax.sweep.runs import prepare_all
    from sat_jax.sweep.watch import State
    from sat_jax.train.metrics import read_metrics

    runs = _runs(given, overrides)
    folder = SweepDir(given.workdir)
    if given.dry_run:
        _show(given, folder, runs)
        return
    if given.record is not None:
        check(given.record)
    ended: list[Any] = []

    def finished(one: Any, summary: dict[str, Any]) -> None:
        ended.append((one, summary))
        if given.record is not None:
            records = read_metrics(folder.watched(one).workdir.metrics)
            record_run(given.record, given.config, one.config, summary, records)

    with ExitStack() as stack:
        folder.hold(stack)
        launcher = _launcher(given, folder)
        prepared, refused = prepare_all(runs, lambda line: print(line, file=sys.stderr))
        runs = _without(runs, refused, given)
        watched = [folder.watched(one) for one in runs]
        for one in watched:
            one.check_data(prepared[one.run.name])
        folder.asked({"command": sys.argv[1:]}, runs)
        drive(folder, watched, launcher, finished)
    if ended:
        order = [one.name for one in runs]
        print(report(sorted(ended, key=lambda pair: order.index(pair[0].name))))
    failed = [one for one in watched if one.state is State.FAILED]
    for one in failed:
        print(f"failed: {one.run.name}: {one.error} (log: {one.log})", file=sys.stderr)
    if failed:
        raise UserError(f"{len(failed)} of {len(runs)} runs failed; the same command tries again")


def _check(given: Namespace) -> None:
    """What needs no other module."""
    for name in ("seeds", "workers", "flops_per_second"):
        value = getattr(given, name)
        if value is not None and not value > 0:
            raise UserError(f"--{name.replace('_', '-')} {value}; accepted: more than 0")
    if given.launcher != "slurm" and given.slurm:
        raise UserError("--slurm has options of --launcher slurm")
    if given.launcher != "local" and given.gpus:
        raise UserError("--gpus is for --launcher local; on Slurm: --slurm gpus_per_node=N")


def _runs(given: Namespace, overrides: Sequence[str]) -> list[Any]:
    """The runs that are asked for and can be."""
    from sat_jax.config_values import experiment, experiment_sweep
    from sat_jax.sweep.axes import combine, listed, parse_axes, read_runs
    from sat_jax.sweep.runs import make_runs

    values = experiment(given.config)
    axes = parse_axes(given.axis)
    if given.runs is not None:
        listing = listed(read_runs(given.runs), f"--runs {given.runs}")
    else:
        asked = experiment_sweep(given.config)
        listing = None if asked is None else listed(asked, f"get_sweep() of {given.config}")
    fixed, points = combine(overrides, axes, listing, given.seeds)
    runs, refused = make_runs(values, fixed, points)
    return _without(runs, refused, given)


def _without(runs: Sequence[Any], refused: Sequence[Any], given: Namespace) -> list[Any]:
    """The runs that are not refused, after telling of all that are; none is started unless
    --skip-invalid leaves those out."""
    from sat_jax.sweep.axes import told

    for one in refused:
        print(f"invalid: {told(one.settings)}: {one.reason}", file=sys.stderr)
    bad = [one.settings for one in refused]
    good = [one for one in runs if one.settings not in bad]
    if refused and not (given.skip_invalid and good):
        left_out = "; --skip-invalid leaves them out" if good else ""
        raise UserError(f"{len(refused)} runs are invalid, nothing was started{left_out}")
    if refused:
        print(f"left out: {len(refused)} invalid runs", file=sys.stderr)
    return good


def _show(given: Namespace, folder: Any, runs: Sequence[Any]) -> None:
    """The table of a dry run."""
    from sat_jax.sweep.estimate import Speed, dry_run, speed_of

    known = {one.name: folder.watched(one).workdir.finished() for one in runs}
    summaries = [summary for summary in known.values() if summary is not None]
    speed = speed_of(summaries, runs, _BENCHMARK)
    if given.flops_per_second is not None:
        speed = Speed(given.flops_per_second, "--flops-per-second")
    print(dry_run(runs, [name for name, summary in known.items() if summary is not None], speed))


def _launcher(given: Namespace, folder: Any) -> Any:
    from sat_jax.sweep.launch import Local, Slurm, slurm_options

    if given.launcher == "slurm":
        return Slurm(folder.logs, slurm_options(given.slurm), given.workers)
    ids = (given.gpus or "").split(",") if given.gpus else []
    if not all(part.isdecimal() for part in ids):
        raise UserError(f"--gpus {given.gpus}; accepted: CUDA device numbers, as in 0,1,2,3")
    return Local(folder.logs, given.workers or 1, [int(part) for part in ids])


if __name__ == "__main__":
    run(main)
