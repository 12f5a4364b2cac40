"""Continued pre-training of TinyLlama-1.1B, a model of the SAT paper, on your text.

    python -m scripts.train --config=experiments/tinyllama_cpt.py \
        --config.model.path=DIR --config.data.sources=TEXT --workdir=runs/tinyllama

DIR is the Hugging Face directory of TinyLlama-1.1B, or of another model of the family. Device: one
accelerator of 40 GB or more, bfloat16; for more devices set --config.mesh.fsdp=N. Weights and
moments are 12.3 GiB in float32 at all omission rates. Compiled for an H200, a step of eight rows
(one microbatch) needs 18.8 GiB in total if dense and 16 to 18 GiB at rates of 0.6 to 0.2, a refresh
13.3 GiB (docs/efficiency.md). Accumulation adds a copy of the gradients, 4.1 GiB if dense. Time and
perplexity are not measured.
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
