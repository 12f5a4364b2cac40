"""SparseLoRA on SmolLM2-135M-Instruct: LoRA fine-tuning on grade-school mathematics whose frozen
weights omit channels and heads, chosen anew by each layer from each batch.

    python -m scripts.train --config=experiments/sparselora.py \
        --config.data.sources=gsm8k-train.jsonl.gz --workdir=runs/sparselora
    python -m scripts.sweep --config=experiments/sparselora.py \
        --config.data.sources=gsm8k-train.jsonl.gz --workdir=runs/study-sparselora
    python -m scripts.report runs/study-sparselora

The sweep compares LoRA, SparseLoRA at three rates, SparseLoRA with dense answer tokens, and SAT on
LoRA at the FLOPs of the higher two rates, with three seeds. Source and model are those of
experiments/sft_gsm8k.py. Two CPU cores; the sweep was not run.
"""

from typing import Any

from ml_collections import ConfigDict

from experiments import lora
from sat_jax.results.sweep import Comparison, Sweep

SEEDS = 3
COMPARE = Comparison(
    "sparselora",
    "LoRA and SparseLoRA",
    (
        *("sparsity.rate", "sparsity.rate_attention", "sparsity.adapters"),
        "sparsity.dense_answers",
    ),
)


def get_config(variant: str = "sparselora") -> ConfigDict:
    """Variants: `sparselora`; `sat`, which omits adapters with the frozen weights, selects every
    24 steps, and spends as many FLOPs; `dense`, LoRA alone."""
    config = lora.get_config("dense" if variant == "dense" else "sat")
    config.sparsity.rate = {"sparselora": 0.5, "sat": 0.475, "dense": 0.0}[variant]
    config.sparsity.rate_attention = 0.0
    config.data.held_out = 0.2
    config.train.eval_rows = 20
    config.optimizer.schedule = "constant"
    config.sparsity.schedule = "constant"
    config.sparsity.dense_start = 0.1
    config.export.huggingface = False
    if variant == "sparselora":
        config.sparsity.metric = "sparselora"
        config.sparsity.refresh_every = 0
        config.sparsity.adapters = "dense"
    return config


def get_sweep() -> Sweep:
    sat = {"sparsity.adapters": "sparse", "sparsity.metric": "output", "sparsity.refresh_every": 24}
    heads = {"sparsity.rate_attention": 0.33}  # one of three KV groups
    runs: list[dict[str, Any]] = [
        {"sparsity.rate": 0.0},
        {"sparsity.rate": 0.25},
        {"sparsity.rate": 0.5},
        {"sparsity.rate": 0.9, **heads},
        # Answers are at most 743 of the 1,024 tokens of a row.
        {"sparsity.rate": 0.9, **heads, "sparsity.dense_answers": 0.73},
        {"sparsity.rate": 0.475, **sat},
        {"sparsity.rate": 0.725, **heads, **sat},
    ]
    return Sweep([{**run, "seed": seed} for run in runs for seed in range(SEEDS)], (COMPARE,))
