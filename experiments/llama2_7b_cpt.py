"""Continued pre-training of Llama-2-7B, a model of the SAT paper, on your text.

    python -m scripts.train --config=experiments/llama2_7b_cpt.py \
        --config.model.path=DIR --config.data.sources=TEXT --workdir=runs/llama2-7b

DIR is the Hugging Face directory of Llama-2-7B. Devices: eight accelerators of 80 GB, bfloat16,
weights and rows split over all of them (mesh.fsdp = 8). Each has an eighth of the 75.3 GiB of
float32 weights and moments, 9.4 GiB, at all omission rates. A step adds gradients, up to 3.1 GiB
per copy, and activations (docs/efficiency.md: steps compiled for one H200, not run). Time and
perplexity are not measured.
"""

from ml_collections import ConfigDict

from experiments import tinyllama_cpt


def get_config(variant: str = "sat") -> ConfigDict:
    """Variants: `sat`, and `dense`, the same run without SAT."""
    config = tinyllama_cpt.get_config(variant)
    config.train.rows_per_step = 64
    config.optimizer.learning_rate = 2e-5
    config.mesh.fsdp = 8
    return config
