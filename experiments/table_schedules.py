"""Schedules of the omission rate: the ladder (LORS) and others, with and without a dense start.

    python -m scripts.sweep --config=experiments/table_schedules.py:smoke \
        --config.data.sources=TEXT --workdir=runs/study
    python -m scripts.sweep --config=experiments/table_schedules.py:paper-7b \
        --config.model.path=DIR --config.data.sources=TEXT --workdir=runs/study-7b
    python -m scripts.report runs/study

Total hours, estimated as experiments/scales.py describes, not measured: smoke 1.5 on two CPU cores,
small 1.9 on one GPU, paper 67 on one accelerator of 40 GB, 27 runs each; paper-7b 34 and
paper-13b 66 on eight of 80 GB, 9 runs.
"""

from typing import Any

from ml_collections import ConfigDict

from experiments import scales
from sat_jax.results.sweep import Comparison, Sweep

OTHERS = ("constant", "linear", "cosine", "cubic", "s2d", "auto")


def get_config(scale: str = "smoke") -> ConfigDict:
    """Scales: smoke, small, paper, paper-7b, paper-13b; see experiments/scales.py."""
    config = scales.cpt(scale)
    config.train.eval_every = config.train.steps // 8  # for the schedule auto
    return config


def get_sweep(scale: str = "smoke") -> Sweep:
    runs: list[dict[str, Any]] = [{"sparsity.schedule": name} for name in ("ladder", *OTHERS)]
    runs[-1]["sparsity.min_gain"] = 0.02  # relative decrease between two evaluations
    runs.append({"sparsity.schedule": "ladder", "sparsity.dense_start": 0.125})
    names = ("schedule", "rungs", "split", "dense_start", "min_gain")
    settings = tuple(f"sparsity.{name}" for name in names)
    schedules = Comparison("schedules", "Schedule of the omission rate", settings)
    return Sweep(scales.over_seeds(scale, runs), (schedules,))
