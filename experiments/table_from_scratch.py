"""Training from scratch: what can be omitted, against what else the saved FLOPs buy: a dense model
with fewer layers or fewer channels, and dense training of fewer steps.

    python -m scripts.train_tokenizer TEXT --vocab-size 2048 --out runs/tokenizer
    python -m scripts.sweep --config=experiments/table_from_scratch.py:smoke \
        --config.data.sources=TEXT --config.data.tokenizer=runs/tokenizer --workdir=runs/scratch
    python -m scripts.report runs/scratch

The model is the transformer of table_retnet.py, Llama's architecture. Scales: `smoke` and `6m`,
2.2M and 6.2M parameters, 400 steps of 2,048 tokens; `long`, 2,000 steps of the 2.2M; `small`, 8.7M
parameters, 4,000 steps of 16,384 tokens, with a vocabulary of 4,096.
"""

from typing import Any

from ml_collections import ConfigDict

from experiments import table_retnet
from sat_jax.results.sweep import Comparison, Sweep

SCALES = ("smoke", "6m", "long", "small")
SEEDS = 3
RATES = {"all": (0.4, 0.5, 0.6), "backward": (0.4, 0.6)}
SHORTER = (2 / 3, 1 / 2)  # of the steps
NARROWER = (0.6, 0.3)  # of the channels
_RATE, _PASSES = "sparsity.rate", "sparsity.passes"


def get_config(scale: str = "smoke") -> ConfigDict:
    """Scales: smoke, 6m, long, small."""
    if scale not in SCALES:
        raise KeyError(scale)
    config = table_retnet.config_of("smoke" if scale == "long" else scale, "transformer")
    if scale == "long":
        config.train.steps = 2000
        config.data.max_tokens = 5_000_000
    return config


def get_sweep(scale: str = "smoke") -> Sweep:
    """Return the runs with each seed, the first seed of all before the second."""
    config = get_config(scale)
    layers, channels, steps = config.model.n_layers, config.model.d_ff, config.train.steps
    smaller = [
        *({"model.n_layers": layers - fewer} for fewer in (1, 2)),
        *({"model.d_ff": 8 * round(share * channels / 8)} for share in NARROWER),
    ]
    shorter = [{"train.steps": round(share * steps)} for share in SHORTER]
    sparse = [{_PASSES: passes, _RATE: rate} for passes, rates in RATES.items() for rate in rates]
    others = [{"sparsity.branch_rate": 0.5}, {"sparsity.token_skip_rate": 0.5}]
    runs: list[dict[str, Any]] = [{}, *smaller, *shorter, *sparse, *others]
    return Sweep(
        [{**run, "seed": seed} for seed in range(SEEDS) for run in runs],
        (Comparison("scratch", "What is omitted from scratch", (_RATE, _PASSES)),),
    )
