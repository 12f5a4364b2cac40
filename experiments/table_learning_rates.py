"""Learning rates of dense training and SAT, to compare both at their best.

    python -m scripts.sweep --config=experiments/table_learning_rates.py:smoke \
        --config.data.sources=TEXT --workdir=runs/study
    python -m scripts.sweep --config=experiments/table_learning_rates.py:paper-7b \
        --config.model.path=DIR --config.data.sources=TEXT --workdir=runs/study-7b
    python -m scripts.report runs/study

Total hours, estimated as experiments/scales.py describes, not measured: smoke 1.5 on two CPU cores,
small 2.0 on one GPU, paper 71 on one accelerator of 40 GB, 27 runs each; paper-7b 36 and
paper-13b 70 on eight of 80 GB, 9 runs.
"""

from ml_collections import ConfigDict

from experiments import scales
from sat_jax.results.sweep import Comparison, Sweep

FACTORS = (1 / 2, 1.0, 2.0)  # times the learning rate of the scale


def get_config(scale: str = "smoke") -> ConfigDict:
    """Scales: smoke, small, paper, paper-7b, paper-13b; see experiments/scales.py."""
    return scales.cpt(scale)


def get_sweep(scale: str = "smoke") -> Sweep:
    config = get_config(scale)
    usual = config.optimizer.learning_rate
    # Dense, dense with about the FLOPs of SAT, and SAT.
    runs = [{"sparsity.rate": 0.0}, scales.shorter(config)[0], {"sparsity.rate": scales.RATE}]
    runs = [
        seeded
        for factor in FACTORS
        for run in runs
        for seeded in scales.with_seeds(
            scale, {"optimizer.learning_rate": float(f"{factor * usual:.2g}"), **run}
        )
    ]
    return Sweep(
        runs, (Comparison("learning_rates", "Learning rate", ("optimizer.learning_rate",)),)
    )
