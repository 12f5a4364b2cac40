"""SAT at omission rates from 0.2 to 0.6, dense training, and dense training with fewer steps.

    python -m scripts.sweep --config=experiments/table_rates.py:smoke \
        --config.data.sources=TEXT --workdir=runs/study
    python -m scripts.sweep --config=experiments/table_rates.py:paper-7b \
        --config.model.path=DIR --config.data.sources=TEXT --workdir=runs/study-7b
    python -m scripts.report runs/study

Total hours, estimated as experiments/scales.py describes, not measured: smoke 1.4 on two CPU cores,
small 1.8 on one GPU, paper 63 on one accelerator of 40 GB, 27 runs each; paper-7b 32 and
paper-13b 61 on eight of 80 GB, 9 runs.
"""

from typing import Any

from ml_collections import ConfigDict

from experiments import scales
from sat_jax.results.sweep import Sweep


def get_config(scale: str = "smoke") -> ConfigDict:
    """Scales: smoke, small, paper, paper-7b, paper-13b; see experiments/scales.py."""
    return scales.cpt(scale)


def get_sweep(scale: str = "smoke") -> Sweep:
    runs: list[dict[str, Any]] = [{"sparsity.rate": rate} for rate in scales.RATES]
    runs = scales.over_seeds(scale, [*scales.shorter(get_config(scale)), *runs])
    return Sweep(runs, (scales.COMPARE_RATES,))
