"""RetNet against a transformer of equal parameters and tokens, both from scratch. Each is trained
densely, densely with fewer steps, and with SAT: heads and channels on the ladder.

    python -m scripts.train_tokenizer TEXT --vocab-size 2048 --out runs/tokenizer
    python -m scripts.sweep --config=experiments/table_retnet.py:smoke --config.data.sources=TEXT \
        --config.data.tokenizer=runs/tokenizer --workdir=runs/retnet
    python -m scripts.sweep --config=experiments/table_retnet.py:paper --config.data.sources=TEXT \
        --config.data.tokenizer=TOKENIZER --workdir=runs/retnet-1b

Scales: `smoke`, 2.2M parameters, 400 steps of 2,048 tokens; `6m`, 6.2M, as many steps; `small`, the
8.7M of retnet_small.py, 4,000 steps of 16,384 tokens, with a vocabulary of 4,096; `paper`, see
retnet_1b.py. Perplexity on another text, and by position in the row, of the run runs/retnet/NAME:

    python -m scripts.evaluate --model runs/retnet/NAME --text OTHER --context 512 --stride 256 \
        --json FILE
"""

from typing import Any

from ml_collections import ConfigDict

from experiments import retnet_1b, retnet_small, scales
from sat_jax.results.sweep import Comparison, Sweep

SEEDS = {"smoke": 3, "6m": 3, "small": 3, "paper": 1}
SHORTER = 2 / 3  # of the steps, with fewer FLOPs than SAT
MODELS = ("retnet", "transformer")
_SIZES = ("model.preset", "model.n_heads", "model.d_ff")
_MATRIX_SCALE = "optimizer.matrix_scale"
# Width, heads, and channels that give equal parameters (retnet_small.py).
WIDTHS = {
    "smoke": (192, 6, {"retnet": 324, "transformer": 520}),
    "6m": (336, 7, {"retnet": 567, "transformer": 910}),
}
# Learning rate of matrices relative to that of other parameters: the best at the scale smoke of
# table_retnet_learning_rates.py.
MATRIX_SCALES = {"retnet": 0.25, "transformer": 0.125}


def get_config(scale: str = "smoke") -> ConfigDict:
    """Scales: smoke, 6m, small, paper."""
    return config_of(scale, "retnet")


def config_of(scale: str, model: str) -> ConfigDict:
    """Return the settings of a model at a scale."""
    if scale not in SEEDS:
        raise KeyError(scale)
    config = (retnet_1b if scale == "paper" else retnet_small).get_config(model)
    config.train.measure_speed = False
    config.export.huggingface = False
    if scale in WIDTHS:
        width, heads, channels = WIDTHS[scale]
        config.model.d_model = width
        config.model.n_heads = heads
        config.model.d_ff = channels[model]
        config.model.vocab_size = 2048
        config.train.eval_every = 0
        config.optimizer.learning_rate = 4e-3
        config.optimizer.matrix_scale = MATRIX_SCALES[model]
    if scale == "small":
        config.train.steps = 4000
        config.train.rows_per_step = 32
        config.data.max_tokens = None
    return config


def models(scale: str) -> list[dict[str, Any]]:
    """Return the settings in which the two models differ, dense."""
    paths = [path.split(".") for path in (*_SIZES, _MATRIX_SCALE)]
    configs = [config_of(scale, model) for model in MODELS]
    return [{f"{group}.{name}": c[group][name] for group, name in paths} for c in configs]


def get_sweep(scale: str = "smoke") -> Sweep:
    """Return the runs with each seed, the first seed of all before the second."""
    shorter = {"train.steps": round(SHORTER * get_config(scale).train.steps)}
    methods: tuple[dict[str, Any], ...] = ({}, {"sparsity.rate": scales.RATE}, shorter)
    runs = [{**model, **method} for model in models(scale) for method in methods]
    return Sweep(
        [{**run, "seed": seed} for seed in range(SEEDS[scale]) for run in runs],
        (
            Comparison(
                "models",
                "RetNet and a transformer of equal parameters",
                (*_SIZES, _MATRIX_SCALE),
            ),
        ),
    )
