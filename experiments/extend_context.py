"""Longer context by continued pre-training, with the recipe of YaRN (arXiv:2309.00071, section
4.1): 400 steps at a learning rate of 2e-5 after 20 steps of warm-up, then half as many at twice the
factor.

    python -m scripts.train --config=experiments/extend_context.py --workdir=runs/extended
    python -m scripts.train --config=experiments/extend_context.py:llama-2-7b-64k \
        --config.model.path=DIR --config.data.sources=TEXT --workdir=runs/64k
    python -m scripts.train --config=experiments/extend_context.py:llama-2-7b-128k \
        --config.model.path=runs/64k/huggingface --config.data.sources=TEXT --workdir=runs/128k

Any scaling of rotary positions: --config.model.rope_type=linear|ntk|yarn|… (docs/long-context.md);
`default` trains without one. Variants:

    dense            SmolLM2-135M-Instruct, from 8,192 to 16,384 positions with rows of 512 tokens
                     (PoSE); two CPU cores; time not measured
    sat              the same with SAT
    llama-2-7b-64k   from 4,096 to 65,536 positions, 64 rows of 65,536 tokens a step; eight
                     accelerators of 80 GB, which share every row (mesh.context = 8). Not run.
    llama-2-7b-128k  the second stage, to 131,072 positions. Not run.

A device of the last two has 9.4 GiB of weights and moments. Temporaries of a step, gradients
included, are 20.7 GiB at 65,536 tokens and 32.4 GiB at 131,072, by XLA's memory analysis of the
step compiled for eight virtual CPU devices; with a row on each device (mesh.fsdp = 8) 74.3 GiB at
65,536. On accelerators: not measured; the first step shows it.

TEXT: long documents, such as books. The Llama scales leave out documents of fewer tokens than a row
has; the ends of longer ones share rows and do not attend to each other.
"""

from ml_collections import ConfigDict

from experiments import llama2_7b_cpt, quickstart


def get_config(variant: str = "dense") -> ConfigDict:
    """Variants: dense, sat, llama-2-7b-64k, llama-2-7b-128k."""
    factors = {"llama-2-7b-64k": 16.0, "llama-2-7b-128k": 32.0}
    if variant in factors:
        config = llama2_7b_cpt.get_config("dense")
        config.model.rope_factor = factors[variant]
        config.data.row_length = round(4096 * factors[variant])
        config.data.min_document_tokens = config.data.row_length
        config.mesh.fsdp = 1
        config.mesh.context = 8  # one row at a time, its tokens on all devices
        config.train.accumulate = config.train.rows_per_step
        config.optimizer.weight_decay = 0.0
    else:
        config = quickstart.get_config(variant)
        config.model.rope_factor = 2.0
        config.data.pose_length = 16_384
        config.data.max_tokens = 250_000
    config.model.rope_type = "yarn"
    config.train.steps = 200 if variant == "llama-2-7b-128k" else 400
    config.optimizer.learning_rate = 2e-5
    config.optimizer.warmup_steps = 20
    config.optimizer.schedule = "constant"
    config.export.huggingface = True
    return config
