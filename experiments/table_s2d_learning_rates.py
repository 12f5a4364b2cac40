"""Learning rates of matrices, relative to those of embeddings, norms and biases, in dense,
block-sparse and sparse-to-dense training from scratch and in that of a smaller dense model, each to
be compared at its best.

    python -m scripts.sweep --config=experiments/table_s2d_learning_rates.py:smoke \
        --config.data.sources=TEXT --config.data.tokenizer=runs/tokenizer --workdir=runs/s2d-rates

Scales and tokenizer: table_s2d.py.
"""

from typing import Any

from ml_collections import ConfigDict

from experiments import table_s2d
from sat_jax.results.sweep import Comparison, Sweep

SCALES = (0.25, 0.125, 0.0625, 0.03125)


def get_config(scale: str = "smoke") -> ConfigDict:
    """Scales: smoke, long, small, paper, paper-13b."""
    return table_s2d.get_config(scale)


def get_sweep(scale: str = "smoke") -> Sweep:
    """Return the runs of one seed."""
    config = get_config(scale)
    dense: dict[str, Any] = {"sparsity.weights.density": 1.0}
    smaller = [{**dense, **sizes} for sizes in table_s2d.smaller(config)[:1]]
    runs = [dense, {}, {"sparsity.schedule": "constant"}, *smaller]
    return Sweep(
        [{**run, "optimizer.matrix_scale": scale} for scale in SCALES for run in runs],
        (Comparison("matrix_scales", "Learning rate of matrices", ("optimizer.matrix_scale",)),),
    )
