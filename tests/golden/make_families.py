"""Makes the tiny Qwen2, Qwen3 and Mistral models beside it, with torch and transformers.

`python tests/golden/make_families.py`, from the root; run once, and its files are committed.
README.md says with which versions. Every run gives the same bytes.
"""

from pathlib import Path

import numpy as np
import torch
from transformers import (
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

HERE = Path(__file__).parent
SHAPE = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# Qwen3's heads are wider than hidden_size / heads, Mistral's narrower: both are explicit numbers.
FAMILIES = {
    "qwen2": (
        Qwen2ForCausalLM,
        Qwen2Config(
            **SHAPE,
            rms_norm_eps=1e-6,
            tie_word_embeddings=True,
            rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0},
        ),
    ),
    "qwen3": (
        Qwen3ForCausalLM,
        Qwen3Config(
            **SHAPE,
            head_dim=12,
            rms_norm_eps=1e-6,
            rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0},
        ),
    ),
    "mistral": (
        MistralForCausalLM,
        MistralConfig(
            **SHAPE,
            head_dim=6,
            rms_norm_eps=1e-5,
            sliding_window=None,
            rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        ),
    ),
}
SEEDS = {"qwen2": 2101, "qwen3": 2102, "mistral": 2103}


def randomise(model: torch.nn.Module, seed: int) -> None:
    """Weights larger than start values, so that mistakes show."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(model.named_parameters()):
        noise = torch.randn(parameter.shape, generator=generator)
        if name.endswith("norm.weight"):
            value = 1 + 0.2 * noise
        elif name.endswith("bias"):
            value = 0.5 * noise
        elif "embed_tokens" in name or "lm_head" in name:
            value = 0.3 * noise
        else:
            value = noise / parameter.shape[1] ** 0.5
            value *= 1.5 if "q_proj" in name or "k_proj" in name else 1.0
        parameter.data.copy_(value)


def make(family: str) -> None:
    """Writes one family's checkpoint directory and its reference.npz."""
    directory = HERE / family
    directory.mkdir(exist_ok=True)
    build, config = FAMILIES[family]
    config._attn_implementation = "eager"
    model = build(config).eval()
    randomise(model, SEEDS[family])
    model.save_pretrained(directory)

    ids = torch.randint(3, 128, (2, 21), generator=torch.Generator().manual_seed(SEEDS[family]))
    output = model(ids, labels=ids)
    output.loss.backward()
    gradients = {name: p.grad for name, p in sorted(model.named_parameters())}
    np.savez_compressed(
        directory / "reference.npz",
        input_ids=ids.numpy().astype(np.int32),
        logits=output.logits.detach().numpy(),
        loss=output.loss.detach().numpy(),
        grad_names=np.array(list(gradients)),
        grad_norms=np.array([g.norm().item() for g in gradients.values()], np.float32),
    )


for name in FAMILIES:
    make(name)
