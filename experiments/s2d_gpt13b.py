"""Sparse-to-dense pre-training of a GPT with 13B parameters, as far as arXiv:2304.05511 tells.

    python -m scripts.train --config=experiments/s2d_gpt13b.py --config.data.sources=TEXT \
        --config.data.tokenizer=TOKENIZER --workdir=runs/s2d-13b

Reconstructed: the paper names a GPT of 13B, weight sparsities of 75 and 87.5 %, and the quality of
the dense model; matrices, blocks, pattern, switch, batch and learning rate are choices of this
file. The sizes are those of GPT-3 13B (preset gpt-13b). Not run; not measured.

Mesh: 8 devices of 80 GB, weights split over all of them (mesh.fsdp 8). Parameters, gradients and
moments are 29 GB at 12.5 % of the blocks, 206 GB when dense (python -m scripts.roofline --model
gpt-13b): 26 GB a device, and update counts of 6 GB.
"""

from ml_collections import ConfigDict

from sat_jax.config_values import default_config


def get_config() -> ConfigDict:
    config = default_config()
    config.model.preset = "gpt-13b"
    config.model.dtype = "bfloat16"
    config.model.remat = "full"
    config.data.row_length = 2048
    config.train.steps = 100_000
    config.train.rows_per_step = 1024
    config.train.accumulate = 32
    config.train.log_every = 10
    config.train.eval_every = 1000
    config.train.eval_rows = 256
    config.optimizer.learning_rate = 1e-4
    config.optimizer.warmup_steps = 2000
    config.optimizer.weight_decay = 0.1
    config.sparsity.schedule = "s2d"
    config.sparsity.split = 0.75
    config.sparsity.weights.density = 0.125
    config.sparsity.weights.block = 128
    config.mesh.fsdp = 8
    config.checkpoint.every = 1000
    config.export.huggingface = True
    return config
