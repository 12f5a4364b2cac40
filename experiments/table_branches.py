"""Backward passes of whole branches left out at random (DropBP), against dense training of fewer
steps and against omitted neurons in the backward pass.

    python -m scripts.sweep --config=experiments/table_branches.py:smoke \
        --config.data.sources=TEXT --workdir=runs/branches
    python -m scripts.sweep --config=experiments/table_branches.py:paper-7b \
        --config.model.path=DIR --config.data.sources=TEXT --workdir=runs/branches-7b
    python -m scripts.report runs/branches

Not measured yet; `scripts.sweep --dry-run` prints the FLOPs of each run.
"""

from typing import Any

from ml_collections import ConfigDict

from experiments import scales
from sat_jax.results.sweep import Comparison, Sweep

RATES = (0.25, 0.5, 0.75)
_RATE, _BRANCH_RATE, _BRANCHES = "sparsity.rate", "sparsity.branch_rate", "sparsity.branches"


def get_config(scale: str = "smoke") -> ConfigDict:
    """Scales: smoke, small, paper, paper-7b, paper-13b; see experiments/scales.py."""
    config = scales.cpt(scale)
    config.sparsity.rate = 0.0
    return config


def get_sweep(scale: str = "smoke") -> Sweep:
    """Return three rates, with and without attention, the ends of the model dense, and both kinds
    of omission together."""
    layers = layers_of(scale)
    by_rate: list[dict[str, Any]] = [{_BRANCH_RATE: rate} for rate in RATES]
    inner = (0.0, 0.0, *[0.5] * (layers - 4), 0.0, 0.0)
    others = [
        {_BRANCH_RATE: 0.5, _BRANCHES: "attention"},
        {_BRANCH_RATE: 0.5, _BRANCHES: "mlp"},
        {_BRANCH_RATE: inner},
        {_BRANCH_RATE: 0.5, "sparsity.schedule": "constant"},
        {_RATE: scales.RATE, "sparsity.passes": "backward"},
        {_BRANCH_RATE: 0.25, _RATE: scales.RATE, "sparsity.passes": "backward"},
    ]
    shorter = scales.shorter(get_config(scale))
    return Sweep(
        scales.over_seeds(scale, [*shorter, *by_rate, *others]),
        (
            Comparison(
                "branches",
                "Backward passes of whole branches",
                (_BRANCH_RATE, _BRANCHES, _RATE, "sparsity.passes", "sparsity.schedule"),
            ),
        ),
    )


def layers_of(scale: str) -> int:
    """Return the number of layers of the model of a scale."""
    return {"paper": 22, "paper-7b": 32, "paper-13b": 40}.get(scale, 30)
