"""Pre-training of a RetNet with the sizes of the smallest in arXiv:2307.08621, 1.3B parameters.

    python -m scripts.train --config=experiments/retnet_1b.py --config.data.sources=TEXT \
        --config.data.tokenizer=TOKENIZER --workdir=runs/retnet-1b

Sizes are those of the preset retnet-1.3b, whose vocabulary is GPT-2's; batch, steps, learning rate
and regularisation are choices of this file. Not run; not measured.

Mesh: 8 devices of 80 GB, weights split over all of them (mesh.fsdp 8). Parameters, gradients and
moments are 1.32B × 16 bytes = 21 GB in float32, 2.6 GB a device. A microbatch has 8 rows a device,
for which the backward pass needs the inputs of all layers, 8 × 2,048 × 2,048 × 24 in bfloat16: 1.6
GB. What one layer needs on top of that is not measured.
"""

from ml_collections import ConfigDict

from sat_jax.config_values import default_config


def get_config(variant: str = "retnet") -> ConfigDict:
    """Variants: `retnet`; `transformer`, Llama's architecture with 0.2 % more parameters; `sat`,
    RetNet with 40 % of heads and channels omitted at first."""
    config = default_config()
    preset, heads, channels = {
        "retnet": ("retnet-1.3b", 8, 3456),
        "transformer": ("smollm2-1.7b", 16, 5568),
        "sat": ("retnet-1.3b", 8, 3456),
    }[variant]
    config.model.preset = preset
    config.model.d_model = 2048
    config.model.n_layers = 24
    config.model.n_heads = heads
    config.model.d_ff = channels
    config.model.vocab_size = 50_257
    config.model.dtype = "bfloat16"
    config.model.remat = "full"
    config.data.row_length = 2048
    config.train.steps = 25_000
    config.train.rows_per_step = 2048
    config.train.accumulate = 32
    config.train.log_every = 10
    config.train.eval_every = 1000
    config.train.eval_rows = 256
    config.optimizer.learning_rate = 6e-4
    config.optimizer.warmup_steps = 375
    config.optimizer.schedule = "linear"
    config.optimizer.weight_decay = 0.05
    config.optimizer.beta2 = 0.98
    config.sparsity.rate = 0.4 if variant == "sat" else 0.0
    config.sparsity.refresh_every = 50
    config.mesh.fsdp = 8
    config.checkpoint.every = 500
    config.export.huggingface = True
    return config
