"""SAT in supervised fine-tuning: omission rates from 0.2 to 0.6, a dense forward pass,
least-squares correction, and dense training with fewer steps.

    python -m scripts.sweep --config=experiments/table_sft.py:smoke \
        --config.data.sources=gsm8k-train.jsonl.gz --workdir=runs/study-sft
    python -m scripts.sweep --config=experiments/table_sft.py:paper-7b \
        --config.model.path=DIR --config.data.sources=MESSAGES --workdir=runs/study-sft-7b
    python -m scripts.report runs/study-sft

The scales smoke and small need JSON lines of question and answer, the others of messages.

Total hours, estimated as experiments/scales.py describes, not measured: smoke 1.7 on two CPU cores,
small 0.3 on one GPU, paper 39 on one accelerator of 40 GB, 33 runs each; paper-7b 18 and
paper-13b 35 on eight of 80 GB, 10 runs.
"""

from typing import Any

from ml_collections import ConfigDict

from experiments import scales
from sat_jax.results.sweep import Sweep


def get_config(scale: str = "smoke") -> ConfigDict:
    """Scales: smoke, small, paper, paper-7b, paper-13b; see experiments/scales.py."""
    return scales.sft(scale)


def get_sweep(scale: str = "smoke") -> Sweep:
    runs: list[dict[str, Any]] = [{"sparsity.rate": rate} for rate in scales.RATES]
    runs += [{"sparsity.passes": "backward"}]
    if scale in scales.CORRECTED:
        runs += [{"sparsity.least_squares_correction": True}]
    runs = scales.over_seeds(scale, [*scales.shorter(get_config(scale)), *runs])
    return Sweep(runs, (scales.COMPARE_RATES, scales.COMPARE_PASSES))
