"""Train a model with SAT. The same command continues an interrupted run.

  python -m scripts.train --config=experiments/tiny.py --workdir=runs/tiny
  python -m scripts.train --config=experiments/quickstart.py --workdir=runs/mine \\
      --config.sparsity.rate=0.5 --config.model.path=DIR --config.data.sources=a.txt,b.jsonl

--config.NAME=VALUE changes a setting of the experiment file; all settings are listed below.
Prepared data and compiled programs are stored in $SAT_JAX_CACHE (default ~/.cache/sat_jax).
"""

import shlex
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sat_jax.cli import Parser, run

if TYPE_CHECKING:
    from sat_jax.config import Config

_PREFIX = "--config."
_RESULTS = Path(__file__).resolve().parents[1] / "experiments" / "results" / "runs.jsonl"


def parser() -> Parser:
    """Return the parser of the command line without settings."""
    parser = Parser("train", f"{__doc__}\n{_settings()}")
    add = parser.add_argument
    add("--config", required=True, metavar="FILE[:VARIANT]", help="an experiment file")
    add("--workdir", required=True, type=Path, metavar="DIR", help="work directory of the run")
    add("--record", type=Path, metavar="FILE",
        help="append the result to this .jsonl file of rows")  # fmt: skip
    add("--distributed", action="store_true",
        help="join the other processes of this job (Slurm, Open MPI or a TPU pod)")  # fmt: skip
    return parser


def main() -> None:
    """Run the training and print its summary."""
    overrides = [a.removeprefix(_PREFIX) for a in sys.argv[1:] if a.startswith(_PREFIX)]
    options = parser().parse_args([a for a in sys.argv[1:] if not a.startswith(_PREFIX)])
    from sat_jax.config_values import load

    config = load(options.config, overrides)

    from sat_jax.parallel.processes import is_primary, join
    from sat_jax.results.record import dense_reference, finished_row, record_run
    from sat_jax.results.rows import check
    from sat_jax.results.run_table import end_of_run
    from sat_jax.train.loop import train
    from sat_jax.train.workdir import WorkDir

    if options.record is not None:
        check(options.record)
    if options.distributed:
        join()
    summary = train(config, options.workdir, lambda line: print(line, file=sys.stderr))
    if not is_primary():
        return
    if options.record is not None:
        record_run(options.record, finished_row(WorkDir(options.workdir), options.config))
    reference = dense_reference(_RESULTS, config, summary["data"])
    shown = {
        "perplexity_dense": reference,
        "next_commands": _next(options, overrides, config, summary["export"]),
    }
    print(end_of_run(summary | shown))


def _next(options: Any, overrides: list[str], config: "Config", export: str | None) -> list[str]:
    """Return commands to try after this run."""
    from sat_jax.config_values import experiment_sweep

    commands = []
    if export is not None:
        prompt = ["The "]
        if config.data.format != "text":
            prompt = ["What is 6 times 7?", "--chat"]
        elif any(source.endswith(".py") for source in config.data.sources):
            prompt = ["def "]
        commands.append(_command("generate", "--model", export, "--prompt", *prompt))
    inputs = ["--config.model.path=DIR", "--config.data.sources=TEXT", "--workdir=runs/mine"]
    commands.append(_command("train", "--config=experiments/tinyllama_cpt.py", *inputs))
    varied, values = "sparsity.rate", "0,0.2,0.4,0.6"
    if config.sparsity.weights.density < 1:
        varied, values = "sparsity.weights.density", "1,0.5,0.25"
    settings = [f"{_PREFIX}{o}" for o in overrides if not o.startswith(f"{varied}=")]
    axis = ["--axis", f"{varied}={values}"]
    if experiment_sweep(options.config) is not None:
        axis = []  # the experiment declares its runs
    workdir = f"--workdir={options.workdir}-rates"
    commands.append(_command("sweep", f"--config={options.config}", *settings, *axis, workdir))
    return commands


def _command(script: str, *arguments: str) -> str:
    """Return a shell command with the Python interpreter of this process."""
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
