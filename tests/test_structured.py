"""Structured pruning: smaller models of every family, against masks and against formulas."""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sat_jax.compress import structured
from sat_jax.compress.structured import (
    PrunedModel,
    Structured,
    gather_kept,
    indicator,
    prune_units,
)
from sat_jax.compress.unit_scores import unit_scores
from sat_jax.errors import UserError
from sat_jax.interop import open_weights, save_model
from sat_jax.models.build import layout_of, shapes
from sat_jax.models.decoder_config import DecoderConfig
from sat_jax.models.gpt2 import GPT2Config
from sat_jax.models.gpt_neox import GPTNeoXConfig
from sat_jax.models.llama import LlamaConfig
from sat_jax.models.resize import axis_sizes
from sat_jax.models.retnet import RetNetConfig
from tests.small_models import CONFIGS, batch, random_params
from tests.tolerances import assert_close

_SIZES: dict[str, Any] = {
    "vocab_size": 32,
    "d_model": 16,
    "n_layers": 3,
    "n_heads": 4,
    "d_ff": 24,
    "max_positions": 32,
}
LLAMA = CONFIGS["gqa"]  # 4 KV groups of 3 heads of size 4
GPT2 = GPT2Config(**_SIZES)
FAMILIES: dict[str, DecoderConfig] = {
    "llama": LLAMA,
    "gpt2": GPT2,
    "gpt_neox": GPTNeoXConfig(**_SIZES, rotary_fraction=0.5),
    "retnet": RetNetConfig(**_SIZES, d_value=32, chunk=16),
}
DECAY = "layers/retention/log_decay"
QUARTER = {"channel": 0.25, "embed": 0.25}


@functools.partial(jax.jit, static_argnums=0)
def logits(config: DecoderConfig, values: Any, masks: Any = None) -> jax.Array:
    rows = batch(config)
    model = layout_of(config).bind(values, masks or {})
    return model(rows.tokens, rows.segment_ids, rows.positions)


def assert_written(result: PrunedModel, directory: Path) -> None:
    """A directory with the model has its config and its values."""
    expected = {path: value.shape for path, value in shapes(result.config).items()}
    assert {path: value.shape for path, value in result.values.items()} == expected
    save_model(layout_of(result.config).bind(result.values), directory)
    written = open_weights(directory)
    assert written.config == result.config
    for path, value in result.values.items():
        assert_close(written.read(path), value, "float32", "exact")


def random_kept(config: DecoderConfig, kept: dict[str, int]) -> dict[str, np.ndarray]:
    """Random indices of kept units by axis, others in each layer."""
    rng, layout, sizes = np.random.default_rng(2), layout_of(config), axis_sizes(config)
    result = {}
    for axis, count in kept.items():
        unit = layout.units.get(axis)
        lead = [sizes[name] for name in ("layer", *unit.within)] if unit else []
        order = rng.random((*lead, sizes[axis])).argsort(-1)
        result[axis] = np.sort(order[..., :count])
    return result


def masks_of(config: DecoderConfig, kept: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    units = layout_of(config).units
    return {name: indicator(kept[name], units[name].size).astype(np.float32) for name in units}


def test_a_smaller_model_is_the_model_with_masks(tmp_path: Path) -> None:
    """On heads, channels, the residual stream, and what the removed layer adds.

    With 12 of 16 channels, √mean(x²) of an RMS norm is √(16 / 12) that of 16 with four zeros.
    """
    method = Structured(remove={"kv_group": 0.25, "query_head": 0.3, "layer": 0.3, **QUARTER})
    config, kept = method.smaller(LLAMA), random_kept(LLAMA, method.kept(LLAMA))
    assert isinstance(config, LlamaConfig)
    assert (config.d_model, config.d_ff, config.n_layers, config.head_dim) == (12, 18, 2, 4)
    assert (config.n_heads, config.n_kv_heads) == (6, 3)
    layout, values = layout_of(LLAMA), dict(random_params(LLAMA))
    smaller = gather_kept(layout, dict(values), kept)
    assert_written(PrunedModel(config, smaller, kept, {}), tmp_path / "out")
    stream, layers = indicator(kept["embed"], 16), indicator(kept["layer"], 3)
    for path, leaf in layout.leaves.items():
        value = values[path]
        if leaf.axes[-1] in ("embed", "norm"):
            value = value * stream
        if leaf.axes[-1] == "norm":
            value = value * np.float32((12 / 16) ** 0.5)
        if leaf.role == "write":
            value = value * layers.reshape(3, *(1,) * (value.ndim - 1))
        values[path] = value
    masked = dataclasses.replace(LLAMA, norm_eps=LLAMA.norm_eps * 12 / 16)
    expected = logits(masked, values, masks_of(LLAMA, kept))
    assert_close(logits(config, smaller), expected, "float32", "forward")


@pytest.mark.slow
def test_a_smaller_model_with_biases_is_the_model_with_masks() -> None:
    layout, values = layout_of(GPT2), random_params(GPT2)
    kept = random_kept(GPT2, {"kv_group": 3, "query_head": 1, "channel": 23})
    smaller = gather_kept(layout, dict(values), kept)
    expected = logits(GPT2, values, masks_of(GPT2, kept))
    assert_close(logits(GPT2, smaller), expected, "float32", "forward")


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox"])
def test_heads_of_one_size_with_less_width(family: str, tmp_path: Path) -> None:
    config = FAMILIES[family]
    method = Structured(remove={"kv_group": 0.25, "layer": 0.3, **QUARTER})
    kept, smaller = random_kept(config, method.kept(config)), method.smaller(config)
    assert (smaller.d_model, smaller.n_heads, smaller.d_ff, smaller.n_layers) == (12, 3, 18, 2)
    values = gather_kept(layout_of(config), dict(random_params(config)), kept)
    assert_written(PrunedModel(smaller, values, kept, {}), tmp_path / "out")


def test_heads_of_a_tensor_that_layers_share(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A file of RetNet has the decays of heads once, so that all layers keep the same heads: those
    of the highest mean score."""
    config, rng = FAMILIES["retnet"], np.random.default_rng(0)
    values = {path: rng.random(x.shape, np.float32) for path, x in shapes(config).items()}
    values[DECAY][:] = decays = np.arange(4, dtype=np.float32)
    heads = np.asarray([[0, 1, 2, 3], [9, 1, 1, 1], [0, 1, 0, 0]])  # means 3, 1, 1 and 4/3
    scores = {"head": heads, "channel": rng.random((3, 24)), "embed": np.arange(16) % 4}
    monkeypatch.setattr(structured, "unit_scores", lambda *_: scores)
    method = Structured(remove={"head": 0.25, **QUARTER})
    result = prune_units(config, dict(values), [], method)
    assert result.kept["head"].tolist() == [[0, 1, 3]] * 3  # the lower index at a tie
    assert_close(result.values[DECAY], np.tile(decays[[0, 1, 3]], (3, 1)), "float32", "exact")
    query = values["layers/retention/query"][:, [0, 1, 3]][..., np.arange(16) % 4 > 0]
    assert_close(result.values["layers/retention/query"], query, "float32", "exact")
    assert result.summary["embed"] == {
        "of": 16,
        "kept": 12,
        "layers": [
            {"removed": "0 4 8 12", "share_of_scores": 0, "highest_removed": 0, "lowest_kept": 1}
        ],
    }
    assert_written(result, tmp_path / "out")


def test_selection_and_summary_by_hand() -> None:
    """Channel c of layer l has weights of one size; the others, and heads, are equal."""
    config = dataclasses.replace(LLAMA, n_layers=2, d_ff=4)
    values = {path: np.array(value) for path, value in random_params(config).items()}
    sizes = np.asarray([[3, 1, 2, 4], [1, 1, 5, 1]], np.float32)
    for name in ("gate", "up", "down"):
        values[f"layers/mlp/{name}"][:] = sizes[..., None]
    method = Structured(remove={"channel": 0.5}, importance="magnitude")
    result = prune_units(config, dict(values), [batch(config)], method)
    assert result.kept["channel"].tolist() == [[0, 3], [0, 2]]  # the lower index at a tie
    norm = 48**0.5  # of three rows of 16 ones
    first, second = result.summary["channel"].pop("layers")
    assert result.summary["channel"] == {"of": 4, "kept": 2}
    assert [first.pop("removed"), second.pop("removed")] == ["1-2", "1 3"]
    assert_close(list(first.values()), [0.3, 2 * norm, 3 * norm], "float32", "forward")
    assert_close(list(second.values()), [0.25, norm, norm], "float32", "forward")
    values["layers/mlp/up"][0, 0, 0] = np.nan
    with pytest.raises(UserError, match="the scores of channel are not finite"):
        prune_units(config, values, [batch(config)], method)


@pytest.mark.slow
def test_scores() -> None:
    """Against formulas of the residual streams between the layers, without padding."""
    config = CONFIGS["mha"]
    rows, values, layout = batch(config), random_params(config), layout_of(config)
    found = unit_scores(config, values, [rows], ["channel", "embed", "layer"], "output")
    tokens = np.asarray(rows.segment_ids) > 0

    @jax.jit
    def layer(own: Any, x: Any) -> jax.Array:
        return layout.bind(own).apply_layers(x, rows.segment_ids, rows.positions)[0]

    def normed(x: Any, scale: np.ndarray) -> np.ndarray:
        x = np.asarray(x, np.float64)[tokens]
        return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + config.norm_eps) * scale

    stream, width = jnp.asarray(values["embed"])[rows.tokens], np.zeros(16)
    for number in range(3):
        of_layer = {
            path: values[path][number : number + 1] if leaf.in_layers else values[path]
            for path, leaf in layout.leaves.items()
        }
        down = of_layer["layers/mlp/down"]
        middle = layer(of_layer | {"layers/mlp/down": 0 * down}, stream)
        after = layer(of_layer, stream)
        inputs = [
            normed(x, values[f"layers/{name}_norm"][number])
            for x, name in ((stream, "attention"), (middle, "mlp"))
        ]
        width += sum(np.abs(x).mean(0) for x in inputs)
        gate, up = (inputs[1] @ of_layer[f"layers/mlp/{name}"][0].T for name in ("gate", "up"))
        channels = gate / (1 + np.exp(-gate)) * up
        norms = np.sqrt(np.mean(channels**2, axis=0)) * np.linalg.norm(down[0], axis=-1)
        assert_close(found["channel"][number], norms, "float32", "forward")
        x, y = (np.asarray(a, np.float64)[tokens] for a in (stream, after))
        products = (x * y).sum(-1) / np.linalg.norm(x, axis=-1) / np.linalg.norm(y, axis=-1)
        assert_close(found["layer"][number], 1 - products.mean(), "float32", "forward")
        stream = after
    assert_close(found["embed"], width, "float32", "forward")
    # The gradient of a mask on a channel of the last layer is Σ a · ⟨down, ∂L/∂x⟩.
    x, scale = np.asarray(stream, np.float64)[tokens], values["final_norm"]
    norm = np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + config.norm_eps)
    exponents = np.exp(x / norm * scale @ values["lm_head"].T)
    d_logits = exponents / exponents.sum(-1, keepdims=True)
    d_logits[np.arange(len(x)), np.asarray(rows.targets)[tokens]] -= 1
    d_logits *= np.asarray(rows.loss_mask)[tokens][:, None]
    d_normed = d_logits @ values["lm_head"] * scale / norm
    d_x = d_normed - x / norm**2 * np.mean(x * d_normed, axis=-1, keepdims=True)
    gradient = np.sum(channels * (d_x @ down[0].T), axis=0)
    taylor = unit_scores(config, values, [rows, rows], ["channel"], "taylor")["channel"]
    assert_close(taylor[-1], abs(gradient) / tokens.sum(), "float32", "backward")


REFUSED: list[tuple[str, dict[str, float], str]] = [
    ("llama", {}, "needs shares to remove, such as channel=0.25"),
    (
        "llama",
        {"head": 0.5},
        "remove head: llama has no such units; accepted: kv_group, query_head",
    ),
    ("llama", {"channel": 1.0}, "remove channel=1; accepted: a share between 0 and 1"),
    ("llama", {"channel": 0.01}, "remove channel=0.01 removes none of 24; accepted"),
    ("gpt2", {"query_head": 0.5}, "remove query_head=0.5 removes none of 1; accepted"),
    ("gpt2", {"kv_group": 0.25}, "gpt2: head_dim would be 5 with .* n_heads 3, and .* have 4"),
    ("gpt2", {"embed": 0.2, "kv_group": 0.25}, "n_head = 3 is not supported; accepted: a div.* 13"),
    ("gpt_neox", {"embed": 0.25}, "gpt_neox: head_dim would be 3 with n_layers 3, d_model 12"),
    ("retnet", {"embed": 0.25}, "retnet with d_model 12, d_value 32 and 4 heads; accepted: mul"),
    ("retnet", {"embed": 0.5}, "retnet: head_dim would be 2 with .*d_model 8"),
]


@pytest.mark.parametrize(("family", "remove", "message"), REFUSED)
def test_what_is_refused(family: str, remove: dict[str, float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Structured(remove=remove).smaller(FAMILIES[family])


def test_an_importance_that_does_not_exist() -> None:
    with pytest.raises(UserError, match="importance 'wanda'; accepted: magnitude, output, taylor"):
        Structured(remove={"channel": 0.5}, importance="wanda")
