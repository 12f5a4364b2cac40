"""Pre-training of a small GPT from scratch, block-sparse first and dense at the end (S2D,
arXiv:2304.05511).

    python -m scripts.train_tokenizer TEXT --vocab-size 4096 --out runs/tokenizer
    python -m scripts.train --config=experiments/s2d_small.py --config.data.sources=TEXT \
        --config.data.tokenizer=runs/tokenizer --workdir=runs/s2d

TEXT: a folder of text, for example the sources of Debian's linux-doc-6.1 (experiments/README.md).
GPT-2's architecture with 6 layers of width 256 and 4,096 tokens: 6.0M parameters. 400 steps of
2,048 tokens, some minutes on two CPU cores.
"""

from ml_collections import ConfigDict

from sat_jax.config_values import default_config


def get_config(variant: str = "s2d") -> ConfigDict:
    """Variants: `s2d`, three quarters of the steps with a quarter of the blocks; `sparse`, all
    steps; `dense`."""
    config = default_config()
    config.model.preset = "gpt2"
    config.model.d_model = 256
    config.model.n_layers = 6
    config.model.n_heads = 4
    config.model.d_ff = 1024
    config.model.vocab_size = 4096
    config.model.loss_chunk = 256
    config.data.row_length = 256
    config.data.held_out = 0.02
    config.data.max_tokens = 1_000_000
    config.train.steps = 400
    config.train.rows_per_step = 8
    config.train.log_every = 10
    config.train.eval_every = 100
    config.train.eval_rows = 64
    config.optimizer.learning_rate = 4e-3
    config.optimizer.matrix_scale = 0.25
    config.optimizer.warmup_steps = 20
    config.optimizer.final_scale = 0.0
    config.optimizer.weight_decay = 0.1
    schedules = {"s2d": "s2d", "sparse": "constant", "dense": "s2d"}
    config.sparsity.schedule = schedules[variant]
    config.sparsity.split = 0.75
    config.sparsity.weights.density = 1.0 if variant == "dense" else 0.25
    config.sparsity.weights.block = 32
    return config
