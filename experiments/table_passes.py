"""Which passes omit neurons, how the neurons are chosen where the forward pass has all, weight
gradients from a sample of the tokens, and tokens that skip layers.

    python -m scripts.sweep --config=experiments/table_passes.py:smoke \
        --config.data.sources=TEXT --workdir=runs/passes
    python -m scripts.sweep --config=experiments/table_passes.py:paper-7b \
        --config.model.path=DIR --config.data.sources=TEXT --workdir=runs/passes-7b
    python -m scripts.report runs/passes

Rates are chosen so that bounds are comparable: `weights` at 0.9 saves about as many FLOPs as
`backward` at 0.45. Dense runs of fewer steps are what the saved FLOPs would buy. Not measured yet;
`scripts.sweep --dry-run` prints the FLOPs of each run.
"""

from typing import Any

from ml_collections import ConfigDict

from experiments import scales
from sat_jax.results.sweep import Comparison, Sweep

RATES = {"all": (0.2, 0.4), "backward": (0.4, 0.6), "weights": (0.6, 0.9)}
METRICS = ("uniform", "output", "gradient_l1", "gradient_l2", "update_gain")
SKIP_RATES = (0.25, 0.5)
_TOKENS, _SKIPS = "sparsity.token_rate", "sparsity.token_skip_rate"
_RATE, _PASSES, _METRIC = "sparsity.rate", "sparsity.passes", "sparsity.metric"


def get_config(scale: str = "smoke") -> ConfigDict:
    """Scales: smoke, small, paper, paper-7b, paper-13b; see experiments/scales.py."""
    return scales.cpt(scale)


def get_sweep(scale: str = "smoke") -> Sweep:
    """Return the passes at two rates each, the metrics at the higher one, sampled tokens, and
    tokens that skip layers."""
    by_rate: list[dict[str, Any]] = [
        {_PASSES: passes, _RATE: rate} for passes, rates in RATES.items() for rate in rates
    ]
    by_metric = [
        {_PASSES: passes, _RATE: RATES[passes][1], _METRIC: metric}
        for passes in ("backward", "weights")
        for metric in METRICS
        if metric != "output"  # the default, above
    ]
    by_tokens: list[dict[str, Any]] = [
        *({_RATE: 0.0, _TOKENS: rate} for rate in RATES["weights"]),
        *({_RATE: 0.0, _SKIPS: rate} for rate in SKIP_RATES),
    ]
    shorter = scales.shorter(get_config(scale))
    return Sweep(
        scales.over_seeds(scale, [*shorter, *by_rate, *by_metric, *by_tokens]),
        (
            scales.COMPARE_PASSES,
            Comparison("update_metrics", "Passes and metric", (_RATE, _PASSES, _METRIC)),
            Comparison("tokens", "Tokens of weight gradients", (_RATE, _TOKENS)),
            Comparison("skipped_tokens", "Tokens that skip layers", (_RATE, _SKIPS)),
        ),
    )
