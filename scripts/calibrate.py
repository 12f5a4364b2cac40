"""Measures which layers can spare neurons, for `sparsity.budget`: a few minutes, before training.

  python -m scripts.calibrate --config=experiments/quickstart.py --out budget.json
  python -m scripts.train --config=experiments/quickstart.py --workdir=runs/budget \\
      --config.sparsity.budget=budget.json --config.sparsity.dense_layers=

Each block of layers in turn omits neurons, heads and channels apart, at the rates of the settings;
what the loss rises by says how the rate of a run is best spread over layers. One file serves runs
of any rate, at the metric and the model it was made with. Settings are given as to train.
"""

import sys
from pathlib import Path

from sat_jax.cli import Parser, run
from sat_jax.errors import UserError

_PREFIX = "--config."


def parser() -> Parser:
    """What the command line takes besides settings."""
    made = Parser("calibrate", __doc__)
    add = made.add_argument
    add("--config", required=True, metavar="FILE[:VARIANT]", help="an experiment file")
    add("--out", required=True, type=Path, metavar="FILE", help="where to write it, as JSON")
    add("--blocks", type=int, default=10, metavar="N", help="runs of layers; default 10")
    add("--rows", type=int, default=4, metavar="N", help="training rows; default 4")
    return made


def main() -> None:
    """Measures, writes, and says what rates would follow."""
    overrides = [a.removeprefix(_PREFIX) for a in sys.argv[1:] if a.startswith(_PREFIX)]
    given = parser().parse_args([a for a in sys.argv[1:] if not a.startswith(_PREFIX)])
    if given.rows < 1:
        raise UserError(f"--rows {given.rows}; accepted: 1 or more")
    if given.out.exists():
        raise UserError(f"--out {given.out}: is there already")
    if not given.out.parent.is_dir():
        raise UserError(f"--out {given.out}: there is no folder {given.out.parent}")
    from sat_jax.config_values import load
    from sat_jax.sparsity.budget import save
    from sat_jax.sparsity.controller import overall
    from sat_jax.train.calibrate import calibrate
    from sat_jax.train.setup import set_up, spread_by

    config = load(given.config, overrides)
    task = set_up(config, _say)
    layers = task.controller.neurons.layers
    if not 1 <= given.blocks <= layers:
        raise UserError(f"--blocks {given.blocks}; accepted: 1 to {layers}, the model's layers")
    measured = calibrate(task, given.blocks, given.rows, _say)
    save(measured, given.out)
    rates = spread_by(measured, config, task.controller.neurons)(*config.rates)
    print(f"{'layer':>5} {'heads':>6} {'channels':>8}   rates, asked for a mean of {config.rates}")
    for layer, (heads, channels) in enumerate(zip(*rates, strict=True)):
        print(f"{layer:>5} {heads:>6.2f} {channels:>8.2f}")
    heads, channels = map(overall, rates)
    print(f"{'mean':>5} {heads:>6.2f} {channels:>8.2f}")
    print(f"written: {given.out}; use it with --config.sparsity.budget={given.out}")


def _say(line: str) -> None:
    print(line, file=sys.stderr)


if __name__ == "__main__":
    run(main)
