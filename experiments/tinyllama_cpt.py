"""Continued pre-training of TinyLlama-1.1B, a model of the SAT paper, on your text.

    python -m scripts.train --config=experiments/tinyllama_cpt.py \
        --config.model.path=DIR --config.data.sources=TEXT --workdir=runs/tinyllama

DIR is the Hugging Face directory of TinyLlama-1.1B (or of any other model of the family).
Device: one accelerator of 40 GB or more, bfloat16. Weights and Adam's moments are 13.2 GB in
float32. While neurons are omitted, what is kept exists twice: 6.3 GB more at rate 0.5, at most 9.0
(at 0.25). A step adds gradients, up to 4.4 GB a copy, and activations. Going from one selection to
the next adds a copy of what is kept instead: 25 GB in all at rate 0.5, at most 31 (at 0.125).
These are sizes of shapes, and the last two XLA's own (`memory_analysis`) of the programs compiled
for CPU. More devices: --config.mesh.fsdp=N. Time and perplexity: not measured; the command above
measures them.
"""

from ml_collections import ConfigDict

from sat_jax.config_values import default_config


def get_config(variant: str = "sat") -> ConfigDict:
    """Variants: `sat`, and `dense`, the same run without SAT."""
    config = default_config()
    config.model.preset = None
    config.model.dtype = "bfloat16"
    config.model.remat = "full"
    config.data.row_length = 2048
    config.train.steps = 2000
    config.train.rows_per_step = 32
    config.train.accumulate = 4
    config.train.log_every = 10
    config.train.eval_every = 200
    config.train.eval_rows = 128
    config.optimizer.learning_rate = 4e-5
    config.optimizer.warmup_steps = 50
    config.optimizer.weight_decay = 0.1
    config.sparsity.rate = {"sat": 0.5, "dense": 0.0}[variant]
    config.sparsity.dense_layers = (0, 1)
    config.sparsity.refresh_every = 50
    config.checkpoint.every = 200
    config.export.huggingface = True
    return config
