"""Learning rates of RetNet, of a transformer of equal parameters, and of RetNet with SAT, so that
each is compared at its best.

    python -m scripts.sweep --config=experiments/table_retnet_learning_rates.py:smoke \
        --config.data.sources=TEXT --config.data.tokenizer=runs/tokenizer --workdir=runs/retnet

Scales and tokenizer: table_retnet.py.
"""

from ml_collections import ConfigDict

from experiments import scales, table_retnet
from sat_jax.results.sweep import Comparison, Sweep

FACTORS = (1.0, 0.5, 2.0, 0.25, 4.0)  # times the learning rate of the scale


def get_config(scale: str = "smoke") -> ConfigDict:
    """Scales: smoke, small, paper."""
    return table_retnet.get_config(scale)


def get_sweep(scale: str = "smoke") -> Sweep:
    """Return the runs of one seed."""
    usual = get_config(scale).optimizer.learning_rate
    retnet, transformer = table_retnet.models(scale)
    runs = [retnet, transformer, {**retnet, "sparsity.rate": scales.RATE}]
    rates = [float(f"{factor * usual:.2g}") for factor in FACTORS]
    return Sweep(
        [{**run, "optimizer.learning_rate": rate} for rate in rates for run in runs],
        (Comparison("learning_rates", "Learning rate", ("optimizer.learning_rate",)),),
    )
