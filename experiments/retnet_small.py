"""Pre-training of a small RetNet from scratch (arXiv:2307.08621), or of a transformer with equally
many parameters.

    python -m scripts.train_tokenizer TEXT --vocab-size 4096 --out runs/tokenizer
    python -m scripts.train --config=experiments/retnet_small.py --config.data.sources=TEXT \
        --config.data.tokenizer=runs/tokenizer --workdir=runs/retnet

TEXT: a folder of text, for example the sources of Debian's linux-doc-6.1 (experiments/README.md).
4 layers of width 384 and 4,096 tokens: 8.7M parameters. 400 steps of 2,048 tokens on a CPU; time
and perplexity are not measured.
"""

from ml_collections import ConfigDict

from sat_jax.config_values import default_config

# Both have one head of keys for each head of queries, gated MLPs, and a head that is tied to the
# embedding.
RETNET, TRANSFORMER = "retnet-1.3b", "smollm2-1.7b"


def get_config(variant: str = "retnet") -> ConfigDict:
    """Variants: `retnet`; `transformer`, Llama's architecture; `sat`, RetNet with 40 % of heads and
    channels omitted at first."""
    config = default_config()
    # Values are 27/16 of the width. 2 D² + 3 D (values + channels) are the parameters of a layer of
    # RetNet, 4 D² + 3 D channels those of the transformer.
    preset, channels = {
        "retnet": (RETNET, 648),
        "transformer": (TRANSFORMER, 1040),
        "sat": (RETNET, 648),
    }[variant]
    config.model.preset = preset
    config.model.d_model = 384
    config.model.n_layers = 4
    config.model.n_heads = 6
    config.model.d_ff = channels
    config.model.vocab_size = 4096
    config.model.loss_chunk = 256
    config.data.row_length = 512
    config.data.held_out = 0.02
    config.data.max_tokens = 1_000_000
    config.train.steps = 400
    config.train.rows_per_step = 4
    config.train.log_every = 10
    config.train.eval_every = 100
    config.train.eval_rows = 32
    config.optimizer.learning_rate = 2e-3
    config.optimizer.warmup_steps = 20
    config.optimizer.final_scale = 0.0
    config.optimizer.weight_decay = 0.1
    config.sparsity.rate = 0.4 if variant == "sat" else 0.0
    return config
