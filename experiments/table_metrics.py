"""Importance metrics with both selections (topk, sample), and an oracle: the metric `output` with a
probe of all tokens in every step.

    python -m scripts.sweep --config=experiments/table_metrics.py:smoke \
        --config.data.sources=TEXT --workdir=runs/study
    python -m scripts.sweep --config=experiments/table_metrics.py:paper-7b \
        --config.model.path=DIR --config.data.sources=TEXT --workdir=runs/study-7b
    python -m scripts.report runs/study

Total hours, estimated as experiments/scales.py describes, not measured: smoke 2.4 on two CPU cores,
small 3.1 on one GPU, paper 109 on one accelerator of 40 GB, 45 runs each; paper-7b 55 and
paper-13b 106 on eight of 80 GB, 15 runs.
"""

from typing import Any

from ml_collections import ConfigDict

from experiments import scales
from sat_jax.results.sweep import Comparison, Sweep

METRICS = ("uniform", "magnitude", "wanda", "maxip", "svd", "output", "taylor")


def get_config(scale: str = "smoke") -> ConfigDict:
    """Scales: smoke, small, paper, paper-7b, paper-13b; see experiments/scales.py."""
    return scales.cpt(scale)


def get_sweep(scale: str = "smoke") -> Sweep:
    # With random scores topk and sample are the same.
    pairs = [(m, s) for m in METRICS for s in ("topk", "sample") if (m, s) != ("uniform", "sample")]
    runs: list[dict[str, Any]] = [
        {"sparsity.metric": metric, "sparsity.selection": selection} for metric, selection in pairs
    ]
    config = get_config(scale)
    tokens = config.train.rows_per_step * config.data.row_length
    oracle = {"sparsity.refresh_every": 1, "sparsity.probe_tokens": tokens}
    settings = ("sparsity.metric", "sparsity.selection")
    metrics = Comparison("metrics", "Importance metric and selection", settings)
    return Sweep(scales.over_seeds(scale, [*runs, oracle]), (metrics, scales.COMPARE_REFRESH))
