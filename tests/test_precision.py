"""Sums over many tokens: gradients in bfloat16 against those in float32."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Array

from sat_jax.data.batch import Batch
from sat_jax.models.build import layout_of
from sat_jax.models.decoder_config import DecoderConfig
from sat_jax.models.gpt2 import GPT2Config
from sat_jax.models.llama import LlamaConfig
from sat_jax.nn.decoder import Compute
from sat_jax.nn.loss import next_token_loss
from sat_jax.train.probe import observe_batch
from tests.conftest import slow_after
from tests.small_models import random_params

SIZES: dict[str, Any] = {
    "vocab_size": 32,
    "d_model": 16,
    "n_layers": 2,
    "n_heads": 4,
    "d_ff": 32,
    "max_positions": 32,
}
MODELS = {
    "llama": LlamaConfig(**SIZES, n_kv_heads=2, head_dim=4, qkv_bias=True, qk_norm=True),
    "gpt2": GPT2Config(**SIZES),
}
ROWS, LENGTH = 256, 32  # 8,192 tokens


def many_tokens(config: DecoderConfig) -> Batch:
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (ROWS, LENGTH))
    ones = np.ones((ROWS, LENGTH), np.int32)
    positions = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), ones.shape)
    targets = np.full((ROWS, LENGTH), 3)  # one token, so that gradients of tokens share a sign
    parts = (tokens, targets, ones, positions, ones.astype(bool))
    return Batch(*map(jnp.asarray, parts))


def gradients(config: DecoderConfig, dtype: str) -> Mapping[str, Array]:
    """Gradients of vectors, and of masks of ones (Taylor scores), by name."""
    layout = layout_of(config, Compute(dtype))  # type: ignore[arg-type]
    params, batch = random_params(config), many_tokens(config)

    @jax.jit
    def of_params(params: dict[str, Array]) -> dict[str, Array]:
        return jax.grad(lambda p: next_token_loss(layout.bind(p), *batch)[0])(params)

    vectors = {path for path, leaf in layout.leaves.items() if leaf.role == "vector"}
    seen = jax.jit(lambda p: observe_batch(layout, p, batch, ("gradients",)))(params)
    grads = {path: g for path, g in of_params(params).items() if path in vectors}
    return grads | {f"mask of {unit}": g for unit, g in seen.gradients.items()}


@pytest.mark.parametrize("name", slow_after(1, *MODELS))
def test_gradients_that_are_sums_over_tokens_are_accumulated_in_float32(name: str) -> None:
    exact, rounded = (gradients(MODELS[name], dtype) for dtype in ("float32", "bfloat16"))
    if name == "gpt2":  # is zero: a shift of all scores of a query
        del rounded["layers/attention/key_bias"]
    ratios = {
        path: float(np.linalg.norm(gradient) / np.linalg.norm(exact[path]))
        for path, gradient in rounded.items()
    }
    assert {path: ratio for path, ratio in ratios.items() if abs(ratio - 1) > 0.015} == {}
