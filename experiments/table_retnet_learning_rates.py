"""Learning rates of matrices, relative to those of embeddings and norms: RetNet, a transformer of
equal parameters, and RetNet with SAT, each to be compared at its best.

    python -m scripts.sweep --config=experiments/table_retnet_learning_rates.py:smoke \
        --config.data.sources=TEXT --config.data.tokenizer=runs/tokenizer --workdir=runs/retnet

Scales and tokenizer: table_retnet.py.
"""

from ml_collections import ConfigDict

from experiments import scales, table_retnet
from sat_jax.results.sweep import Comparison, Sweep

SCALES = (0.125, 0.25, 0.5, 0.0625)


def get_config(scale: str = "smoke") -> ConfigDict:
    """Scales: smoke, 6m, small, paper."""
    return table_retnet.get_config(scale)


def get_sweep(scale: str = "smoke") -> Sweep:
    """Return the runs of one seed."""
    retnet, transformer = table_retnet.models(scale)
    runs = [retnet, transformer, {**retnet, "sparsity.rate": scales.RATE}]
    return Sweep(
        [{**run, "optimizer.matrix_scale": scale} for scale in SCALES for run in runs],
        (Comparison("retnet_rates", "Learning rate of matrices", ("optimizer.matrix_scale",)),),
    )
