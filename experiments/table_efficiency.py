"""Speed, time, memory and FLOPs by omission rate, and cost and benefit of refreshes.

    python -m scripts.sweep --config=experiments/table_efficiency.py:smoke \
        --config.data.sources=TEXT --workdir=runs/study
    python -m scripts.sweep --config=experiments/table_efficiency.py:paper-7b \
        --config.model.path=DIR --config.data.sources=TEXT --workdir=runs/study-7b
    python -m scripts.report runs/study

Use one run at a time on an idle machine: speed-ups are not meaningful otherwise.

Total hours, estimated as experiments/scales.py describes, not measured: smoke 1.6 on two CPU cores,
small 2.1 on one GPU, paper 72 on one accelerator of 40 GB, 30 runs each; paper-7b 37 and
paper-13b 70 on eight of 80 GB, 10 runs.
"""

from typing import Any

from ml_collections import ConfigDict

from experiments import scales
from sat_jax.results.sweep import Sweep

FACTORS = (0.25, 0.5, 1, 2, 4)  # times the interval between refreshes of the scale


def get_config(scale: str = "smoke") -> ConfigDict:
    """Scales: smoke, small, paper, paper-7b, paper-13b; see experiments/scales.py."""
    return scales.cpt(scale)


def get_sweep(scale: str = "smoke") -> Sweep:
    interval = scales.cpt(scale).sparsity.refresh_every
    runs: list[dict[str, Any]] = [{"sparsity.rate": rate} for rate in scales.RATES]
    runs += [
        {"sparsity.refresh_every": round(factor * interval)} for factor in FACTORS if factor != 1
    ]
    return Sweep(scales.over_seeds(scale, runs), (scales.COMPARE_RATES, scales.COMPARE_REFRESH))
