"""What can be omitted when a model that is trained well for its size is trained further on another
text: every pass and every unit, against dense training at several learning rates and lengths.

The base has 2.2M parameters and 4.1M tokens of TEXT; OTHER is another text (experiments/README.md):

    python -m scripts.train_tokenizer TEXT --vocab-size 2048 --out runs/tokenizer
    python -m scripts.train --config=experiments/table_continued.py:base \
        --config.data.sources=TEXT --config.data.tokenizer=runs/tokenizer --workdir=runs/base
    python -m scripts.sweep --config=experiments/table_continued.py:smoke \
        --config.model.path=runs/base/huggingface --config.data.sources=OTHER \
        --workdir=runs/continued
    python -m scripts.report runs/continued

`--halving 3` trains all methods on 100 steps, the better half on 200, and half of these on all 400.
"""

from typing import Any

from ml_collections import ConfigDict

from experiments import table_from_scratch
from sat_jax.results.sweep import Comparison, Sweep

SEEDS = 3
LEARNING_RATES = (2e-3, 1e-3, 4e-3)  # the first one is that of all other runs
SHORTER = (5 / 6, 2 / 3, 1 / 2)  # of the steps
_RATE, _PASSES, _METRIC = "sparsity.rate", "sparsity.passes", "sparsity.metric"
_OTHERS = {
    "sparsity.branch_rate": (0.25, 0.5),
    "sparsity.token_rate": (0.6, 0.9),
    "sparsity.token_skip_rate": (0.25, 0.5),
}
OMITTED = {"all": (0.2, 0.4), "backward": (0.4, 0.6), "weights": (0.6, 0.9)}


def get_config(variant: str = "smoke") -> ConfigDict:
    """Variants: base, trained from scratch; smoke, trained further from model.path."""
    config = table_from_scratch.get_config("long" if variant == "base" else "smoke")
    if variant == "base":
        config.export.huggingface = True
        return config
    if variant != "smoke":
        raise KeyError(variant)
    for name in ("preset", "d_model", "n_layers", "n_heads", "d_ff", "vocab_size"):
        config.model[name] = None
    config.optimizer.learning_rate = LEARNING_RATES[0]
    return config


def get_sweep(variant: str = "smoke") -> Sweep | None:
    """Return the runs with each seed, the first seed of all before the second; None for base."""
    if variant == "base":
        return None
    steps = get_config(variant).train.steps
    dense: list[dict[str, Any]] = [
        {},
        *({"optimizer.learning_rate": rate} for rate in LEARNING_RATES[1:]),
        *({"train.steps": round(share * steps)} for share in SHORTER),
    ]
    units = [{_PASSES: passes, _RATE: rate} for passes, rates in OMITTED.items() for rate in rates]
    gains = [
        {_PASSES: passes, _RATE: OMITTED[passes][1], _METRIC: "update_gain"}
        for passes in ("backward", "weights")
    ]
    others = [{name: rate} for name, rates in _OTHERS.items() for rate in rates]
    runs = [*dense, *units, *gains, *others]
    return Sweep(
        [{**run, "seed": seed} for seed in range(SEEDS) for run in runs],
        (
            Comparison(
                "continued",
                "What is omitted in further training",
                (_RATE, _PASSES, _METRIC, *_OTHERS),
            ),
        ),
    )
