"""Pruned models in transformers. `make test-real`."""

from pathlib import Path

import numpy as np
import pytest

from sat_jax.compress.structured import Structured, gather_kept
from sat_jax.interop import open_weights, save_model
from sat_jax.models.build import layout_of
from tests.golden_model import GOLDEN
from tests.test_real import their_logits
from tests.test_structured import random_kept
from tests.tolerances import assert_close

pytestmark = [
    pytest.mark.real,
    pytest.mark.filterwarnings("ignore"),  # those of torch and transformers
]
QUARTER = {"channel": 0.25, "embed": 0.25, "layer": 0.3}
REMOVE = {
    "llama_gqa": {"kv_group": 0.5, "query_head": 0.25, **QUARTER},
    "qwen2": {"query_head": 0.5, **QUARTER},
    "qwen3": {"kv_group": 0.5, **QUARTER},
    "gpt2": {"kv_group": 0.25, **QUARTER},
    "gpt_neox": {"kv_group": 0.25, **QUARTER},
}


@pytest.mark.parametrize("family", REMOVE)
def test_a_pruned_model_loads_in_transformers(family: str, tmp_path: Path) -> None:
    """With sizes of its own config, and the logits that it has here."""
    import torch
    from transformers import AutoModelForCausalLM

    weights, method = open_weights(GOLDEN / family), Structured(remove=REMOVE[family])
    smaller, layout = method.smaller(weights.config), layout_of(weights.config)
    kept = random_kept(weights.config, method.kept(weights.config))
    values = gather_kept(layout, {path: weights.read(path) for path in layout.leaves}, kept)
    model = layout_of(smaller).bind(values)
    save_model(model, tmp_path / "out")
    loaded, report = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype=torch.float32, output_loading_info=True
    )
    assert not any(report.values()), report
    ids = np.random.default_rng(0).integers(0, smaller.vocab_size, (2, 16)).astype(np.int32)
    assert_close(model(ids), their_logits(loaded.eval(), ids), "float32", "forward")
