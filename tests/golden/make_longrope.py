"""Make `llama_gqa/rope_longrope.npz`: logits of transformers with LongRoPE, below and above the
original length.

  python tests/golden/make_longrope.py
"""

import json
from pathlib import Path

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

FOLDER = Path(__file__).parent / "llama_gqa"


def main() -> None:
    """Write the logits of the first 20 and of all 96 tokens of `rope_scaled.npz`."""
    settings = json.loads((FOLDER / "rope_longrope.json").read_text())
    config = LlamaConfig(**json.loads((FOLDER / "config.json").read_text()) | settings)
    model = LlamaForCausalLM.from_pretrained(
        FOLDER, config=config, dtype=torch.float32, attn_implementation="eager"
    )
    ids = np.load(FOLDER / "rope_scaled.npz")["input_ids"]
    logits = {}
    for length in (20, 96):
        with torch.no_grad():
            output = model(torch.tensor(ids[:, :length], dtype=torch.int64))
        logits[f"logits_{length}"] = output.logits.numpy()
    np.savez_compressed(FOLDER / "rope_longrope.npz", **logits)


if __name__ == "__main__":
    main()
