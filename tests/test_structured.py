"""Structured pruning: smaller models of every family, against masks and against formulas."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sat_jax.compress.structured import PrunedModel, Structured, gather_kept, prune_units
from sat_jax.compress.unit_scores import unit_scores
from sat_jax.errors import UserError
from sat_jax.interop import load_model, save_model
from sat_jax.models.build import layout_of, shapes
from sat_jax.models.decoder_config import DecoderConfig
from sat_jax.models.gpt2 import GPT2Config
from sat_jax.models.gpt_neox import GPTNeoXConfig
from sat_jax.models.retnet import RetNetConfig
from sat_jax.nn.loss import next_token_loss
from sat_jax.sparsity.rows import indicator
from tests.conftest import slow_after
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
    "retnet": RetNetConfig(**_SIZES, d_value=32, chunk=8),
}
QUARTER = {
    "llama": {"kv_group": 0.25, "query_head": 0.3, "channel": 0.25, "embed": 0.25, "layer": 0.3},
    "gpt2": {"kv_group": 0.25, "channel": 0.25, "embed": 0.25},
    "gpt_neox": {"kv_group": 0.25, "channel": 0.25, "embed": 0.25, "layer": 0.3},
    "retnet": {"head": 0.25, "channel": 0.25, "embed": 0.25},
}


def pruned(config: DecoderConfig, importance: str = "magnitude", **remove: float) -> PrunedModel:
    method = Structured(remove=remove, importance=importance)
    return prune_units(config, dict(random_params(config)), [batch(config)], method)


@functools.partial(jax.jit, static_argnums=0)
def logits(config: DecoderConfig, values: Any, masks: Any = None) -> jax.Array:
    rows = batch(config)
    model = layout_of(config).bind(values, masks or {})
    return model(rows.tokens, rows.segment_ids, rows.positions)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_without_units_is_the_model_with_masks(family: str) -> None:
    """Random heads and channels, in each layer others."""
    config, rng = FAMILIES[family], np.random.default_rng(2)
    layout = layout_of(config)
    kept, masks = {}, {}
    for name, unit in layout.units.items():
        lead = (layout.layers, *(layout.units[outer].size for outer in unit.within))
        order = rng.random((*lead, unit.size)).argsort(-1)
        keep = max(1, unit.size - 1)
        kept[name] = jnp.asarray(np.sort(order[..., :keep]), jnp.int32)
        masks[name] = indicator(kept[name], unit.size).astype(jnp.float32)
    values = random_params(config)
    smaller = gather_kept(layout, dict(values), kept)
    assert smaller["layers/mlp/down"].shape == (3, 23, 16)
    assert_close(logits(config, smaller), logits(config, values, masks), "float32", "forward")


@pytest.mark.parametrize("family", FAMILIES)
def test_the_config_of_a_pruned_model(family: str, tmp_path: Any) -> None:
    """The written directory has the config and the values, with heads of the size as before."""
    result = pruned(FAMILIES[family], **QUARTER[family])
    config, removed_layers = result.config, "layer" in QUARTER[family]
    assert (config.d_model, config.d_ff, config.n_layers) == (12, 18, 2 if removed_layers else 3)
    assert config.n_heads == (3 * 2 if family == "llama" else 3)
    expected = {path: value.shape for path, value in shapes(config).items()}
    assert {path: value.shape for path, value in result.values.items()} == expected
    model = layout_of(config).bind(result.values)
    save_model(model, tmp_path / "out")
    loaded = load_model(tmp_path / "out")
    assert loaded.config == config
    tokens = batch(config).tokens
    assert_close(loaded(tokens), model(tokens), "float32", "exact")


def test_width_is_a_mask_on_the_residual_stream() -> None:
    """With 12 of 16 channels, √mean(x²) of an RMS norm is √(16 / 12) that of 16 with four zeros."""
    result, values = pruned(LLAMA, embed=0.25), dict(random_params(LLAMA))
    mask = np.asarray(indicator(result.kept["embed"], 16))
    for path, leaf in layout_of(LLAMA).leaves.items():
        if leaf.axes[-1] == "embed":
            values[path] = values[path] * mask
        if leaf.axes[-1] == "norm":
            values[path] = values[path] * mask * np.float32((12 / 16) ** 0.5)
    masked = dataclasses.replace(LLAMA, norm_eps=LLAMA.norm_eps * 12 / 16)
    assert_close(logits(result.config, result.values), logits(masked, values), "float32", "forward")


def test_depth_skips_layers() -> None:
    """GPT-2 with a layer that adds nothing, biases included."""
    result, values = pruned(GPT2, layer=0.3), dict(random_params(GPT2))
    (skipped,) = set(range(3)) - set(np.asarray(result.kept["layer"]).tolist())
    for name in ("attention/output", "attention_output_bias", "mlp/down", "mlp_output_bias"):
        values[f"layers/{name}"] = np.array(values[f"layers/{name}"])
        values[f"layers/{name}"][skipped] = 0
    assert_close(logits(result.config, result.values), logits(GPT2, values), "float32", "forward")


def test_selection_and_summary_by_hand() -> None:
    """Channel c of layer l has weights of one size; the others, and heads, are equal."""
    config = dataclasses.replace(LLAMA, n_layers=2, d_ff=4)
    values = {path: np.array(value) for path, value in random_params(config).items()}
    sizes = np.asarray([[3, 1, 2, 4], [1, 1, 5, 1]], np.float32)
    for name in ("gate", "up", "down"):
        values[f"layers/mlp/{name}"][:] = sizes[..., None]
    method = Structured(remove={"channel": 0.5, "layer": 0.5}, importance="magnitude")
    result = prune_units(config, values, [batch(config)], method)
    assert result.kept["channel"].tolist() == [[0, 3], [0, 2]]  # the lower index at a tie
    norm = 48**0.5  # of three rows of 16 ones
    first, second = result.summary["channel"].pop("layers")
    assert result.summary["channel"] == {"of": 4, "kept": 2}
    assert [first.pop("removed"), second.pop("removed")] == ["1-2", "1 3"]
    assert_close(list(first.values()), [0.3, 2 * norm, 3 * norm], "float32", "forward")
    assert_close(list(second.values()), [0.25, norm, norm], "float32", "forward")


@pytest.mark.parametrize("name", slow_after(1, "gqa", "bias"))
def test_taylor_is_the_gradient_of_a_mask(name: str) -> None:
    """|Σ w · ∂L/∂w| over the output weights of a unit, and of a group over those of its heads; two
    batches have the gradients of their sum."""
    config, values = CONFIGS[name], random_params(CONFIGS[name])
    layout, rows = layout_of(config), batch(config)
    found = unit_scores(config, values, [rows, rows], ["kv_group", "channel"], "taylor")

    def loss(masks: Any) -> jax.Array:
        return next_token_loss(layout.bind(values, masks), *rows)[0]

    ones = {"kv_group": jnp.ones((3, 4)), "channel": jnp.ones((3, 24))}
    tokens = 19
    for unit, gradient in jax.jit(jax.grad(loss))(ones).items():
        assert_close(found[unit], abs(gradient) / tokens, "float32", "backward")


def test_scores_of_outputs_width_and_depth() -> None:
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


def test_scores_that_are_not_finite() -> None:
    values = dict(random_params(LLAMA)) | {"layers/mlp/up": np.full((3, 24, 16), np.nan)}
    method = Structured(remove={"channel": 0.5}, importance="magnitude")
    with pytest.raises(UserError, match="the scores of channel are not finite"):
        prune_units(LLAMA, values, [batch(LLAMA)], method)
