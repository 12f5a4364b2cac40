"""Block-sparse pre-training from scratch, against dense training: densities, share of dense steps
at the end, patterns, and the baselines that a user would pick: a smaller model, and fewer steps.

    python -m scripts.train_tokenizer TEXT --vocab-size 2048 --out runs/tokenizer
    python -m scripts.sweep --config=experiments/table_s2d.py:smoke --config.data.sources=TEXT \
        --config.data.tokenizer=runs/tokenizer --workdir=runs/s2d
    python -m scripts.sweep --config=experiments/table_s2d.py:paper-13b \
        --config.data.sources=TEXT --config.data.tokenizer=TOKENIZER --workdir=runs/s2d-13b

Scales: `smoke`, 1.1M parameters, 400 steps of 2,048 tokens; `long`, 2,000 of these steps, a quarter
of the blocks beside the dense baselines; `small`, the 6.0M of s2d_small.py, 4,000 steps of 16,384
tokens; `paper`, GPT-2, 20,000 steps of 131,072 tokens; `paper-13b`, see
s2d_gpt13b.py. The source names neither its matrices, blocks and switch nor its batch and learning
rate: these are choices of this file.
"""

from typing import Any

from ml_collections import ConfigDict

from experiments import s2d_gpt13b, s2d_small
from sat_jax.results.sweep import Comparison, Sweep

DENSITIES = (0.25, 0.125)
PATTERNS = ("magnitude", "erk")
MINUTES = ("smoke", "long")  # scales of the 1.1M model
POWERS_OF_TWO = ("smoke", "long", "small")  # scales whose widths allow a butterfly
SHORTER = (0.6, 0.45)  # of the steps, in dense runs with fewer FLOPs
SEEDS = {"smoke": 3, "long": 3, "small": 3, "paper": 1, "paper-13b": 1}
_DENSITY, _SPLIT, _PATTERN = (
    "sparsity.weights.density", "sparsity.split", "sparsity.weights.pattern",
)  # fmt: skip

# Learning rate of matrices relative to that of other parameters: the best at the scale smoke of
# table_s2d_learning_rates.py. It is divided by the density besides.
MATRIX_SCALES = {"sparse": 0.125, "dense": 0.0625}


def get_config(scale: str = "smoke") -> ConfigDict:
    """Scales: smoke, long, small, paper, paper-13b."""
    if scale == "paper-13b":
        return s2d_gpt13b.get_config()
    if scale not in SEEDS:
        raise KeyError(scale)
    config = s2d_small.get_config()
    config.train.measure_speed = False
    if scale in MINUTES:
        config.model.d_model = 128
        config.model.n_layers = 4
        config.model.d_ff = 512
        config.model.vocab_size = 2048
        config.train.eval_every = 0
        config.optimizer.learning_rate = 4e-3
        config.optimizer.matrix_scale = MATRIX_SCALES["sparse"]
        config.sparsity.weights.block = 16
    if scale == "long":
        config.train.steps = 2000
        config.data.max_tokens = 5_000_000
    if scale == "small":
        config.train.steps = 4000
        config.train.rows_per_step = 64
        config.data.max_tokens = None
    if scale == "paper":
        for size in ("d_model", "n_layers", "n_heads", "d_ff", "vocab_size"):
            config.model[size] = None
        config.data.row_length = 1024
        config.data.max_tokens = None
        config.train.steps = 20_000
        config.train.rows_per_step = 128
        config.optimizer.learning_rate = 6e-4
        config.optimizer.matrix_scale = 1.0
        config.optimizer.warmup_steps = 500
        config.sparsity.weights.block = 64
    return config


def dense(scale: str) -> dict[str, Any]:
    """Return the settings of dense training."""
    tuned = {"optimizer.matrix_scale": MATRIX_SCALES["dense"]} if scale in MINUTES else {}
    return {_DENSITY: 1.0, **tuned}


def smaller(config: ConfigDict) -> list[dict[str, Any]]:
    """Return dense models with a half and with a quarter of the layers. The first has about the
    FLOPs of a quarter of the blocks that become dense at the end, and block-sparse training to the
    end is between both."""
    layers = config.model.n_layers
    if layers is None:
        return []
    return [{"model.n_layers": fewer} for fewer in (layers // 2, layers // 4)]


def get_sweep(scale: str = "smoke") -> Sweep:
    """Return the runs with each seed: first a quarter of the blocks and an eighth beside the dense
    baselines, then other switches, patterns and updates."""
    config = get_config(scale)
    densities = DENSITIES[:1] if scale == "long" else DENSITIES
    sparse = [{_DENSITY: density, "sparsity.schedule": "constant"} for density in densities]
    switched = [{_DENSITY: d, _SPLIT: split} for split in (0.75, 0.5) for d in densities]
    shorter = [{"train.steps": round(share * config.train.steps)} for share in SHORTER]
    baselines = [{**dense(scale), **more} for more in ({}, *shorter, *smaller(config))]
    names = (*PATTERNS, "butterfly") if scale in POWERS_OF_TWO else PATTERNS
    patterns: list[dict[str, Any]] = [{_PATTERN: name} for name in names]
    # 15 exchanges before the switch, on the tokens of one batch of each.
    every = config.train.steps // 20
    rigl = {"sparsity.weights.update": "rigl", "sparsity.weights.update_every": every}
    dynamic = [rigl, {"sparsity.schedule": "ladder"}]
    seeds = range(SEEDS[scale])
    return Sweep(
        [
            {**run, "seed": seed}
            for group in (
                [*baselines, *switched[:2], *sparse],
                [*switched[2:], *patterns, *dynamic],
            )
            for seed in seeds
            for run in group
        ],
        (
            Comparison(
                "density",
                "Stored blocks and the switch to dense",
                (_DENSITY, _SPLIT, "sparsity.schedule"),
            ),
            Comparison("patterns", "Pattern of stored blocks", (_PATTERN,)),
        ),
    )
