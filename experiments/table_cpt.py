"""Ablations of SAT in continued pre-training: heads and channels, dense forward pass, least-squares
correction, and moments of omitted neurons.

    python -m scripts.sweep --config=experiments/table_cpt.py:smoke \
        --config.data.sources=TEXT --workdir=runs/study
    python -m scripts.sweep --config=experiments/table_cpt.py:paper-7b \
        --config.model.path=DIR --config.data.sources=TEXT --workdir=runs/study-7b
    python -m scripts.report runs/study

Moments decay in mask execution only, so that both runs of this comparison use it. They compare
quality, not speed.

Total hours, estimated as experiments/scales.py describes, not measured: smoke 1.9 on two CPU cores,
small 2.4 on one GPU, paper 86 on one accelerator of 40 GB, 33 runs each; paper-7b 37 and
paper-13b 72 on eight of 80 GB, 9 runs.
"""

from typing import Any

from ml_collections import ConfigDict

from experiments import scales
from sat_jax.results.sweep import Comparison, Sweep


def get_config(scale: str = "smoke") -> ConfigDict:
    """Scales: smoke, small, paper, paper-7b, paper-13b; see experiments/scales.py."""
    return scales.cpt(scale)


def get_sweep(scale: str = "smoke") -> Sweep:
    runs: list[dict[str, Any]] = [
        {"sparsity.rate": scales.RATE},
        {"sparsity.rate_mlp": 0.0},  # heads only
        {"sparsity.rate_attention": 0.0},  # channels only
        {"sparsity.attention_unit": "query_head"},
        # At the same rate, and at one that saves about as many FLOPs.
        {"sparsity.passes": "backward"},
        {"sparsity.passes": "backward", "sparsity.rate": 0.6},
    ]
    if scale in scales.CORRECTED:  # at the same two rates
        runs += [{"sparsity.least_squares_correction": True}]
        runs += [{"sparsity.least_squares_correction": True, "sparsity.rate": 0.6}]
    for moments in ("freeze", "decay"):
        runs.append({"sparsity.execution": "mask", "optimizer.moments": moments})
    modules = ("sparsity.rate_attention", "sparsity.rate_mlp", "sparsity.attention_unit")
    comparisons = (
        Comparison("modules", "Heads, channels, or both", modules),
        scales.COMPARE_PASSES,
        Comparison(
            "moments", "Moments of omitted neurons", ("optimizer.moments", "sparsity.execution")
        ),
    )
    return Sweep(scales.over_seeds(scale, runs), comparisons)
