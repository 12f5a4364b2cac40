"""Logits computed with the decoding cache, of golden models."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sat_jax.interop import load_model
from sat_jax.nn.decoder import Decoder, for_decoding
from tests.golden_model import GOLDEN


@functools.cache
def golden(name: str, dtype: str = "float32") -> Decoder:
    return load_model(GOLDEN / name, dtype)


def changed(model: Decoder, **fields: object) -> Decoder:
    model = nnx.merge(*nnx.split(model))
    model.config = dataclasses.replace(model.config, **fields)
    return model


def prompts_of(model: Decoder, *lengths: int) -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [rng.integers(model.config.vocab_size, size=length).tolist() for length in lengths]


@functools.partial(jax.jit, static_argnames="graph")
def extend(graph, params, cache, tokens, segment_ids, positions):
    model = nnx.merge(graph, params)
    x_BTD, cache = model.extend(cache, tokens, segment_ids, positions)
    return jnp.einsum("BTD,VD->BTV", x_BTD, model.head()).astype(jnp.float32), cache


def left_padded(prompts: list[list[int]], fill: int) -> tuple[np.ndarray, np.ndarray]:
    """Return tokens `[B, T]`, and the number of `fill` tokens before the prompt of each row."""
    width = max(map(len, prompts))
    padding = np.array([width - len(prompt) for prompt in prompts])
    rows = [[fill] * n + prompt for n, prompt in zip(padding, prompts, strict=True)]
    return np.array(rows), padding


def cached_logits(
    model: Decoder, tokens: np.ndarray, padding: np.ndarray, step: int = 2
) -> np.ndarray:
    """Return logits `[B, T, V]` computed with the cache, `step` slots at a time."""
    graph, params = nnx.split(for_decoding(model))
    batch, slots = tokens.shape
    all_positions = np.arange(slots)[None] - padding[:, None]
    cache = model.empty_cache(batch, slots)
    parts = []
    for start in range(0, slots, step):
        stop = start + step
        positions = all_positions[:, start:stop]
        ids = (positions >= 0).astype(np.int32)
        positions = np.maximum(positions, 0)
        logits, cache = extend(graph, params, cache, tokens[:, start:stop], ids, positions)
        parts.append(np.asarray(logits))
    return np.concatenate(parts, axis=1)
