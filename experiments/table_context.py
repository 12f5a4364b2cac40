"""Extension of the context of a small model, from 256 to 1,024 and 2,048 tokens, by each scaling of
rotary positions: without training, and trained on a thirtieth of the base model's tokens.

TEXT and EVALUATION have documents above 2,048 tokens, such as those of Debian's linux-doc-6.1
(experiments/README.md), and no document in common:

    LINUX=text/usr/share/doc/linux-doc-6.1/html/_sources
    TEXT="$LINUX/[!nt]*/**/*.txt"  # without networking and translations
    EVALUATION="$LINUX/networking/pktgen.rst.txt $LINUX/networking/openvswitch.rst.txt"
    ROWS=experiments/results/context.jsonl
    python -m scripts.train_tokenizer "$TEXT" --vocab-size 2048 --out runs/tokenizer

For each SEED (0, 1, 2), the base model and its extensions:

    BASE=runs/context/base-$SEED
    python -m scripts.train --config=experiments/table_context.py:base --config.seed=$SEED \
        "--config.data.sources=$TEXT" --config.data.tokenizer=runs/tokenizer --workdir=$BASE \
        --record $ROWS
    for CONTEXT in 1k 2k; do
        python -m scripts.sweep --config=experiments/table_context.py:$CONTEXT \
            --config.seed=$SEED --config.model.path=$BASE/huggingface \
            "--config.data.sources=$TEXT" --workdir=runs/context/$CONTEXT-$SEED --record $ROWS
    done

Then perplexity of all of them and of the base model without training, and passkey retrieval:

    for CONTEXT in 1k 2k; do
        case $CONTEXT in 1k) FACTOR=4 LENGTHS=256,1024;; 2k) FACTOR=8 LENGTHS=256,1024,2048;; esac
        TRAINED=$(dirname runs/context/$CONTEXT-$SEED/*/config.json)
        TEXTS="--text $EVALUATION --context $LENGTHS --record $ROWS"
        python -m scripts.evaluate --model $TRAINED $TEXTS
        for TYPE in default linear ntk ntk_by_parts_paper ntk_by_parts_code \
            yarn_paper yarn dynamic llama3; do
            python -m scripts.evaluate --model $BASE --rope-type $TYPE --rope-factor $FACTOR $TEXTS
        done
    done
    python -m scripts.evaluate --model $BASE --rope-type dynamic_yarn --rope-factor 1 $TEXTS
    TRAINED=$(dirname runs/context/1k-$SEED/*/config.json)
    PASSKEY="--passkey 256,1024 --trials 2 --record $ROWS"
    python -m scripts.evaluate --model $TRAINED $PASSKEY
    python -m scripts.evaluate --model $BASE --rope-type yarn --rope-factor 4 $PASSKEY

`python -m scripts.report $ROWS` has the tables; docs/long-context.md says how it shows them.
"""

from typing import Any

from ml_collections import ConfigDict

from experiments import scales
from sat_jax.config_values import default_config
from sat_jax.nn.rope import EXTENSIONS
from sat_jax.results.sweep import Comparison, Sweep

LENGTH = 256  # of the base model's rows
FACTORS = {"1k": 4, "2k": 8}
# Without dynamic_yarn, which with the factor of a training at a longer length is yarn up to that
# length.
SCALINGS = tuple(name for name in EXTENSIONS if name != "dynamic_yarn")
TOKENS_PER_STEP, EVAL_TOKENS = 2048, 8192


def get_config(variant: str = "2k") -> ConfigDict:
    """Variants: base, trained from scratch; 1k and 2k, trained further from model.path."""
    config = default_config()
    config.data.held_out = 0.02
    config.data.max_tokens = 2_000_000
    config.data.min_document_tokens = LENGTH * FACTORS["2k"] + 1  # the same documents for all runs
    config.train.measure_speed = False
    config.train.log_every = 8
    config.optimizer.weight_decay = 0.1
    config.optimizer.matrix_scale = 0.125  # the best of a transformer in table_retnet.py
    config.model.loss_chunk = LENGTH
    if variant == "base":
        _set_length(config, LENGTH)
        config.model.preset = "llama-2-7b"  # one head of keys for each head of queries
        config.model.d_model = 128
        config.model.n_layers = 4
        config.model.n_heads = 4
        config.model.d_ff = 352
        config.model.vocab_size = 2048
        config.model.max_positions = LENGTH
        config.train.steps = 1000
        config.optimizer.learning_rate = 4e-3
        config.optimizer.warmup_steps = 50
        config.optimizer.final_scale = 0.0
        config.export.huggingface = True
        return config
    _set_length(config, LENGTH * FACTORS[variant])
    config.model.rope_type = "yarn"
    config.model.rope_factor = float(FACTORS[variant])
    config.train.steps = 32
    config.train.eval_every = 8
    # Relative to the base model's as in YaRN, whose 2e-5 is a fifteenth of Llama-2's 3e-4.
    config.optimizer.learning_rate = 2.5e-4
    config.optimizer.warmup_steps = 2  # 20 of 400 in the recipe of YaRN
    config.optimizer.schedule = "constant"
    return config


def _set_length(config: ConfigDict, length: int) -> None:
    """Set the length of rows; tokens per step and per evaluation stay."""
    config.data.row_length = length
    config.train.rows_per_step = TOKENS_PER_STEP // length
    config.train.eval_rows = EVAL_TOKENS // length


def get_sweep(variant: str = "2k") -> Sweep | None:
    """Return a run for each scaling, and two more with YaRN: with skip-wise positions in rows of
    the base model's length (PoSE), and with SAT; None for the base model."""
    if variant == "base":
        return None
    config = get_config(variant)
    context = config.data.row_length
    _set_length(config, LENGTH)
    pose: dict[str, Any] = {
        "data.row_length": config.data.row_length,
        "data.pose_length": context,
        "train.rows_per_step": config.train.rows_per_step,
        "train.eval_rows": config.train.eval_rows,
    }
    yarn = {"model.rope_type": "yarn"}
    runs = [{"model.rope_type": name} for name in SCALINGS]
    return Sweep(
        [*runs, yarn | pose, yarn | {"sparsity.rate": scales.RATE}],
        (Comparison("scalings", "Scaling of rotary positions", ("model.rope_type", *pose)),),
    )
