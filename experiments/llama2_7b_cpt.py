"""Continued pre-training of Llama-2-7B, a model of the SAT paper, on your text.

    python -m scripts.train --config=experiments/llama2_7b_cpt.py \
        --config.model.path=DIR --config.data.sources=TEXT --workdir=runs/llama2-7b

DIR is the Hugging Face directory of Llama-2-7B. Devices: eight accelerators of 80 GB, bfloat16,
weights and rows split over all of them (mesh.fsdp = 8). Each holds an eighth of 81 GB of float32
weights and moments, and of what is kept once more while neurons are omitted: 41 GB at rate 0.5, at
most 69 (at 0.125), so 15 to 19 GB. A step adds gradients, up to 3.4 GB a copy, and activations.
Going from one selection to the next takes 20 GB in all at rate 0.5, at most 27. These are sizes of
shapes, and the last two XLA's own (`memory_analysis`) of the programs compiled for eight CPU
devices. Time and perplexity: not measured; the command above measures them.
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
