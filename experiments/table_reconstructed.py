"""The method as the paper describes it, at omission rates from 0.2 to 0.6, and dense training, also
with fewer steps.

    python -m scripts.sweep --config=experiments/table_reconstructed.py:smoke \
        --config.data.sources=TEXT --workdir=runs/study
    python -m scripts.sweep --config=experiments/table_reconstructed.py:paper-7b \
        --config.model.path=DIR --config.data.sources=TEXT --workdir=runs/study-7b
    python -m scripts.report runs/study

`scripts.train` accepts the same file for a single run. The paper has no published code. Details
that its text does not specify are chosen here, so that results may differ from the paper's.

Gradients are not accumulated. At the scales of the paper a microbatch is therefore four times that
of the other tables; not tested that it fits in memory.

Total hours, estimated as experiments/scales.py describes, not measured: smoke 1.3 on two CPU cores,
small 1.8 on one GPU, paper 62 on one accelerator of 40 GB, 27 runs each; paper-7b 32 and
paper-13b 61 on eight of 80 GB, 9 runs.
"""

from typing import Any

from ml_collections import ConfigDict

from experiments import scales
from sat_jax.results.sweep import Sweep


def get_config(scale: str = "smoke") -> ConfigDict:
    """Scales: smoke, small, paper, paper-7b, paper-13b; see experiments/scales.py."""
    config = scales.cpt(scale)
    config.sparsity.metric = "maxip"  # the metric of the paper, without a probe
    config.sparsity.refresh_every = 0  # per-batch selection in every step
    config.train.accumulate = 1  # required by per-batch selection
    config.sparsity.dense_layers = ()  # the paper mentions none
    # Defaults: topk selection, KV groups, single channels, one rate for both, half of the steps at
    # r0 and then four phases, no correction, omitted neurons not updated.
    return config


def get_sweep(scale: str = "smoke") -> Sweep:
    runs: list[dict[str, Any]] = [{"sparsity.rate": rate} for rate in scales.RATES]
    runs = scales.over_seeds(scale, [*scales.shorter(get_config(scale)), *runs])
    return Sweep(runs, (scales.COMPARE_RATES,))
