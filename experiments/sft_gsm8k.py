"""SAT fine-tunes SmolLM2-135M-Instruct on grade-school mathematics: loss on the answers only.

    python -m scripts.train --config=experiments/sft_gsm8k.py \
        --config.data.sources=gsm8k-train.jsonl.gz --workdir=runs/sft

The source is GSM8K's train split, JSON lines of `question` and `answer`, or any file of that form;
experiments/README.md says where anyone gets it. Two CPU cores: minutes.
"""

from ml_collections import ConfigDict

from experiments import quickstart


def get_config(variant: str = "sat") -> ConfigDict:
    """Variants: `sat`, and `dense`, the same run without SAT."""
    config = quickstart.get_config(variant)
    config.data.sources = ()
    config.data.format = "prompt_completion"
    config.data.prompt_field = "question"
    config.data.completion_field = "answer"
    return config
