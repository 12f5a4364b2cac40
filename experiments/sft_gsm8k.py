"""Fine-tuning of SmolLM2-135M-Instruct with SAT on grade-school mathematics.

    python -m scripts.train --config=experiments/sft_gsm8k.py \
        --config.data.sources=gsm8k-train.jsonl.gz --workdir=runs/sft

The source is the train split of GSM8K, JSON lines of `question` and `answer`, or another file in
this form; experiments/README.md names the source. The loss is on answers only. Minutes on two CPU
cores.
"""

from ml_collections import ConfigDict

from experiments import quickstart


def get_config(variant: str = "sat") -> ConfigDict:
    """Variants: `sat`, and `dense`, the same run without SAT."""
    config = quickstart.get_config(variant)
    config.data.sources = ()
    config.data.row_length = 1024
    config.data.format = "prompt_completion"
    config.data.prompt_field = "question"
    config.data.completion_field = "answer"
    return config
