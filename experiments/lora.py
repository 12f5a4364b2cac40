"""LoRA fine-tuning of SmolLM2-135M-Instruct on grade-school mathematics.

    python -m scripts.train --config=experiments/lora.py \
        --config.data.sources=gsm8k-train.jsonl.gz --workdir=runs/lora

Source, model, steps and rows are those of experiments/sft_gsm8k.py. The run writes the merged model
to runs/lora/huggingface and the adapter for PEFT to runs/lora/adapter. Two CPU cores; neither time
nor loss are measured.
"""

from ml_collections import ConfigDict

from experiments import sft_gsm8k


def get_config(variant: str = "dense") -> ConfigDict:
    """Variants: `dense`; `qlora`, whose base is stored in 4 bits; `sat`, which also omits heads and
    channels; `full`, which trains all parameters without SAT and adapters, with a tenth of the
    learning rate."""
    config = sft_gsm8k.get_config("sat" if variant == "sat" else "dense")
    bases = {"dense": None, "qlora": "nf4", "sat": None}
    config.optimizer.learning_rate = 3e-5 if variant == "full" else 3e-4
    if variant != "full":
        config.lora.base = bases[variant]
        config.lora.rank = 16
        config.lora.alpha = 32.0
    return config
