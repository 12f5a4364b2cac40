"""How much may be omitted: dense, and SAT at rates from 0.2 to 0.6.

    python -m scripts.sweep --config=experiments/table_rates.py:smoke \
        --config.data.sources=TEXT --workdir=runs/study
    python -m scripts.report runs/study --out runs/study-report

Hours in all, estimated, not measured; experiments/scales.py says how and on what: smoke 1.0, small
1.3, paper 45 (18 runs each), paper-7b 22, paper-13b 43 (6 runs).
"""

from typing import Any

from ml_collections import ConfigDict

from experiments import scales


def get_config(scale: str = "smoke") -> ConfigDict:
    """Scales: smoke, small, paper, paper-7b, paper-13b; see experiments/scales.py."""
    return scales.cpt(scale)


def get_sweep(scale: str = "smoke") -> list[dict[str, Any]]:
    return scales.over_seeds(scale, [{"sparsity.rate": rate} for rate in scales.RATES])
