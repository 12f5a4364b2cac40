"""The golden Llama model for tests of evaluation, and runs of `scripts.evaluate` on it."""

import dataclasses
import functools
import sys
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from sat_jax.data.tokenizer import load_tokenizer
from sat_jax.interop import load_model
from sat_jax.nn.decoder import Decoder
from scripts import evaluate

GOLDEN = Path(__file__).parent / "golden"


@functools.cache
def golden() -> Decoder:
    return load_model(GOLDEN / "llama_gqa")


@functools.partial(jax.jit, static_argnames="graph")
def _logits(graph, params, tokens, segment_ids):
    return nnx.merge(graph, params)(tokens, segment_ids)


def logits_of(ids: Sequence[int], width: int, model: Decoder | None = None) -> np.ndarray:
    """Return the logits `[len(ids), V]` of one document, by default of the golden model; compiled
    once for each `width`."""
    row = np.zeros((1, width), np.int32)
    row[0, : len(ids)] = ids
    segment_ids = (np.arange(width) < len(ids)).astype(np.int32)[None]
    return np.asarray(_logits(*nnx.split(model or golden()), row, segment_ids))[0, : len(ids)]


def tokenizer_with(folder: Path, template: str, *special: str) -> Path:
    """Write the tokenizer of 256 bytes with a chat template and `special` tokens to a folder."""
    tokenizer = load_tokenizer("bytes", None, 256)
    tokenizer.backend.add_special_tokens(list(special))
    folder.mkdir()
    dataclasses.replace(tokenizer, chat_template=template).save(folder)
    return folder


def run_evaluate(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> None:
    options = ("--model", GOLDEN / "llama_gqa", *arguments)
    monkeypatch.setattr(sys, "argv", ["evaluate", *map(str, options)])
    evaluate.main()
