"""Adapter directories in transformers and PEFT. `make test-real`."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from sat_jax.compress import LoraSettings, load_adapter, save_adapter
from sat_jax.interop import load_model, save_model
from tests.golden_model import GOLDEN
from tests.test_adapters import PREFIX, TOKENS, adapted
from tests.tolerances import assert_close

pytestmark = [
    pytest.mark.real,
    pytest.mark.filterwarnings("ignore"),  # those of torch, transformers and peft
]
FAMILIES = ("llama_gqa", "llama_tied", "qwen2", "gpt2", "gpt_neox")
VARIANTS = {
    "lora": LoraSettings(rank=2, alpha=6.0),
    "some": LoraSettings(rank=2, alpha=6.0, targets=("query", "attention/output", "up")),
    "rslora": LoraSettings(rank=3, alpha=6.0, rslora=True),
    "dora": LoraSettings(rank=2, alpha=6.0, dora=True),
}


def saved(family: str, variant: str, folder: Path) -> tuple[Any, Any]:
    """Write the base and an adapter, and return the logits with it and transformers' base."""
    import torch
    from transformers import AutoModelForCausalLM

    model = adapted(family, VARIANTS[variant])
    save_model(load_model(GOLDEN / family), folder / "base")
    save_adapter(model, folder / "adapter")
    theirs = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32).eval()
    return model(TOKENS), theirs


def logits_of(model: Any) -> np.ndarray:
    import torch

    with torch.no_grad():
        return model(torch.tensor(np.asarray(TOKENS, np.int64))).logits.numpy()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_modules_are_those_of_transformers(family: str, tmp_path: Path) -> None:
    """Without PEFT: its formula, applied to the modules that the file names."""
    import torch

    expected, theirs = saved(family, "lora", tmp_path)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    modules = {name.removeprefix(PREFIX).rpartition(".lora_")[0] for name in tensors}
    for module in modules:
        weight = theirs.get_submodule(module).weight
        a, b = (tensors[f"{PREFIX}{module}.lora_{kind}.weight"] for kind in "AB")
        update = 3.0 * b @ a  # alpha / rank, also of fused modules
        with torch.no_grad():
            weight += torch.tensor(update.T if config["fan_in_fan_out"] else update)
    assert_close(logits_of(theirs), expected, "float32", "forward")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_peft_has_the_same_logits(family: str, variant: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    expected, theirs = saved(family, variant, tmp_path)
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter").eval()
    assert_close(logits_of(theirs), expected, "float32", "forward")
    theirs.save_pretrained(tmp_path / "again")
    again = load_adapter(load_model(GOLDEN / family), tmp_path / "again")
    assert_close(again(TOKENS), expected, "float32", "forward")
