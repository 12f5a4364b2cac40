"""Which learning rate: dense and SAT each want their own, and only the best of both compare.

    python -m scripts.sweep --config=experiments/table_learning_rates.py:smoke \
        --config.data.sources=TEXT --workdir=runs/study
    python -m scripts.report runs/study --out runs/study-report

Hours in all, estimated, not measured; experiments/scales.py says how and on what: smoke 1.0, small
1.4, paper 49 (18 runs each), paper-7b 25, paper-13b 48 (6 runs).
"""

from typing import Any

from ml_collections import ConfigDict

from experiments import scales

FACTORS = (1 / 3, 1.0, 3.0)  # of the scale's own


def get_config(scale: str = "smoke") -> ConfigDict:
    """Scales: smoke, small, paper, paper-7b, paper-13b; see experiments/scales.py."""
    return scales.cpt(scale)


def get_sweep(scale: str = "smoke") -> list[dict[str, Any]]:
    usual = get_config(scale).optimizer.learning_rate
    return [
        one
        for factor in FACTORS
        for rate in (0.0, scales.RATE)
        for one in scales.with_seeds(
            scale,
            {"optimizer.learning_rate": float(f"{factor * usual:.1g}"), "sparsity.rate": rate},
        )
    ]
