"""Trains a model with SAT, or continues a run that was interrupted: the same command does both.

  python -m scripts.train --config=experiments/tiny.py --workdir=runs/tiny
  python -m scripts.train --config=experiments/quickstart.py --workdir=runs/mine \\
      --config.sparsity.rate=0.5 --config.model.path=DIR --config.data.sources=a.txt,b.jsonl

Any setting below is given as --config.NAME=VALUE and wins over the experiment file's. Prepared data
and compiled programs are kept in $SAT_JAX_CACHE (default ~/.cache/sat_jax).
"""

import shlex
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sat_jax.cli import Parser, run

if TYPE_CHECKING:
    from sat_jax.config import DataConfig

_PREFIX = "--config."
_RESULTS = Path(__file__).resolve().parents[1] / "experiments" / "results" / "runs.jsonl"


def parser() -> Parser:
    """What the command line takes besides settings."""
    made = Parser("train", f"{__doc__}\n{_settings()}")
    made.add_argument(
        "--config", required=True, metavar="FILE[:VARIANT]", help="an experiment file"
    )
    made.add_argument("--workdir", required=True, type=Path, metavar="DIR", help="of this run")
    made.add_argument(
        "--record", type=Path, metavar="FILE", help="append the result to this .jsonl file of rows"
    )
    made.add_argument(
        "--distributed",
        action="store_true",
        help="this is one of several processes that Slurm, Open MPI or a TPU pod started together",
    )
    return made


def main() -> None:
    """One run from settings to summary."""
    overrides = [a.removeprefix(_PREFIX) for a in sys.argv[1:] if a.startswith(_PREFIX)]
    given = parser().parse_args([a for a in sys.argv[1:] if not a.startswith(_PREFIX)])
    from sat_jax.config_values import load

    config = load(given.config, overrides)

    from sat_jax.parallel.processes import is_primary, join
    from sat_jax.results.record import dense_reference, record_run, row_of
    from sat_jax.results.rows import check
    from sat_jax.results.run_table import end_of_run
    from sat_jax.train.loop import train
    from sat_jax.train.metrics import read_metrics
    from sat_jax.train.workdir import WorkDir

    if given.record is not None:
        check(given.record)
    if given.distributed:
        join()
    summary = train(config, given.workdir, lambda line: print(line, file=sys.stderr))
    if not is_primary():
        return
    if given.record is not None:
        records = read_metrics(WorkDir(given.workdir).metrics)
        record_run(given.record, row_of(given.config, config, summary, records))
    reference = dense_reference(_RESULTS, config, summary["data"])
    shown = {
        "perplexity_dense": reference,
        "next_commands": _next(given, overrides, config.data, summary["export"]),
    }
    print(end_of_run(summary | shown))


def _next(given: Any, overrides: list[str], data: "DataConfig", export: str | None) -> list[str]:
    """What to try after this run."""
    from sat_jax.config_values import experiment_sweep

    made = []
    if export is not None:
        prompt = ["The "]
        if data.format != "text":
            prompt = ["What is 6 times 7?", "--chat"]
        elif any(source.endswith(".py") for source in data.sources):
            prompt = ["def "]
        made.append(_command("generate", "--model", export, "--prompt", *prompt))
    own = ["--config.model.path=DIR", "--config.data.sources=TEXT", "--workdir=runs/mine"]
    made.append(_command("train", "--config=experiments/tinyllama_cpt.py", *own))
    same = [f"{_PREFIX}{o}" for o in overrides if not o.startswith("sparsity.rate=")]
    rates = ["--axis", "sparsity.rate=0,0.2,0.4,0.6"]
    if experiment_sweep(given.config) is not None:
        rates = []  # the experiment says itself what to vary
    where = f"--workdir={given.workdir}-rates"
    made.append(_command("sweep", f"--config={given.config}", *same, *rates, where))
    return made


def _command(script: str, *arguments: str) -> str:
    """A line for the shell, with the Python of this process."""
    python = sys.executable
    if shutil.which("python") == python:
        python = "python"
    elif Path(python).is_relative_to(Path.cwd()):
        python = str(Path(python).relative_to(Path.cwd()))
    return shlex.join([python, "-m", f"scripts.{script}", *arguments])


def _settings() -> str:
    from sat_jax.config_values import keys

    lines = ["Settings:"]
    for key in keys():
        lines.append(f"  {key.path} = {key.default!r}")
        lines.append(f"      {key.help}; accepts {key.accepts}")
    return "\n".join(lines)


if __name__ == "__main__":
    run(main)
