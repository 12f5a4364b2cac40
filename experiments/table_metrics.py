"""Which neurons to keep: every metric, taking the best (topk) or drawing by importance (sample).

    python -m scripts.sweep --config=experiments/table_metrics.py:smoke \
        --config.data.sources=TEXT --workdir=runs/study
    python -m scripts.report runs/study --out runs/study-report

Hours in all, estimated, not measured; experiments/scales.py says how and on what: smoke 4.7, small
2.9, paper 100 (42 runs each), paper-7b 51, paper-13b 97 (14 runs).
"""

from typing import Any

from ml_collections import ConfigDict

from experiments import scales

METRICS = ("uniform", "magnitude", "wanda", "maxip", "svd", "output", "taylor")


def get_config(scale: str = "smoke") -> ConfigDict:
    """Scales: smoke, small, paper, paper-7b, paper-13b; see experiments/scales.py."""
    return scales.cpt(scale)


def get_sweep(scale: str = "smoke") -> list[dict[str, Any]]:
    # The most of what is random is as random as a draw of it.
    pairs = [(m, s) for m in METRICS for s in ("topk", "sample") if (m, s) != ("uniform", "sample")]
    runs = [{"sparsity.metric": m, "sparsity.selection": s} for m, s in pairs]
    return scales.over_seeds(scale, runs)
