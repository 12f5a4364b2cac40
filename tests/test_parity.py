"""The models compute what transformers computes, on committed numbers (tests/golden)."""

import functools
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from sat_jax.interop import load_model, open_weights
from sat_jax.interop.huggingface_config import config_from_json
from sat_jax.models import registry
from sat_jax.models.build import build, layout_of, shapes
from sat_jax.nn.decoder import Decoder
from sat_jax.nn.layout import flat_values
from sat_jax.nn.loss import next_token_loss
from sat_jax.nn.stack import cast
from tests.small_models import CONFIGS, random_params
from tests.tolerances import assert_close

GOLDEN = Path(__file__).parent / "golden"
LLAMAS = ("llama_mha", "llama_gqa", "llama_tied")
FAMILIES = ("qwen2", "qwen3", "mistral")
ROPE_SCALED = json.loads((GOLDEN / "llama_gqa" / "rope_scaled.json").read_text())


@functools.cache
def model_of(name: str) -> Decoder:
    return load_model(GOLDEN / name)


def reference(name: str) -> Mapping[str, np.ndarray]:
    return np.load(GOLDEN / name / "reference.npz")


@pytest.mark.parametrize("name", LLAMAS + FAMILIES)
def test_logits(name: str) -> None:
    golden = reference(name)
    logits = model_of(name)(jnp.asarray(golden["input_ids"]))
    assert_close(logits, golden["logits"], "float32", "forward")


@pytest.mark.parametrize("name", ["llama_gqa", "qwen2", "qwen3"])
def test_logits_computed_in_bfloat16(name: str) -> None:
    golden = reference(name)
    logits = load_model(GOLDEN / name, dtype="bfloat16")(jnp.asarray(golden["input_ids"]))
    assert logits.dtype == jnp.float32
    assert_close(logits, golden["logits"], "bfloat16", "forward")


@pytest.mark.parametrize("name", ["norm", "bias"])
def test_weights_are_cast_but_for_vectors_and_masks(name: str) -> None:
    """Norm scales and biases stay float32 until they are used."""
    layout = layout_of(CONFIGS[name])
    masks = {"channel": jnp.ones((layout.layers, layout.units["channel"].size))}
    model = layout.bind(random_params(CONFIGS[name]), masks)
    state = nnx.to_flat_state(cast(nnx.state(model), "bfloat16"))
    values = {path: variable.get_value() for path, variable in state}
    dtypes = {"/".join(path): v.dtype.name for path, v in values.items() if v is not None}
    wide = {path for path, dtype in dtypes.items() if dtype == "float32"}
    vectors = {path for path in layout.leaves if path.endswith(("norm", "bias"))}
    assert wide == vectors | {"layers/mlp/masks/channel"}
    assert set(dtypes.values()) == {"float32", "bfloat16"}


@functools.cache
def loss_and_gradients(name: str) -> tuple[jax.Array, dict[str, np.ndarray]]:
    """Mean next-token loss and its gradients under the names and shapes of Hugging Face."""
    ids = jnp.asarray(reference(name)["input_ids"])
    tokens, targets = ids[:, :-1], ids[:, 1:]
    graph, params = nnx.split(model_of(name))

    def mean_loss(params: Any) -> jax.Array:
        ones = jnp.ones_like(tokens)
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        model = nnx.merge(graph, params)
        total, _ = next_token_loss(model, tokens, targets, ones, positions, ones > 0)
        return total / tokens.size

    loss, gradients = jax.jit(jax.value_and_grad(mean_loss))(params)
    flat = flat_values(nnx.merge(graph, gradients))
    stored = {}
    config = model_of(name).config
    for file in registry.format_of(config).stored_tensors(shapes(config), "huggingface"):
        layer = ... if file.layer is None else file.layer
        parameters = [np.asarray(flat[path])[layer] for path in file.tensor.paths]
        stored[file.name] = file.tensor.huggingface.join(parameters)
    return loss, stored


@pytest.mark.parametrize("name", LLAMAS + FAMILIES)
def test_loss_and_gradient_norms(name: str) -> None:
    golden = reference(name)
    loss, gradients = loss_and_gradients(name)
    assert_close(loss, golden["loss"], "float32", "forward")
    assert set(gradients) == set(golden["grad_names"].tolist())
    norms = dict(zip(golden["grad_names"].tolist(), golden["grad_norms"], strict=True))
    for parameter in norms:
        # The gradient of a key bias is what is left of terms that cancel, since a shift of all
        # scores of a query has no effect. Its error is measured against the key matrix's gradient.
        together = {parameter, parameter.replace("k_proj.bias", "k_proj.weight")}
        actual = [np.linalg.norm(gradients[name].astype(np.float64)) for name in sorted(together)]
        expected = [norms[name] for name in sorted(together)]
        assert_close(actual, expected, "float32", "gradient_norm")


def test_every_gradient() -> None:
    golden = load_file(GOLDEN / "llama_gqa" / "grads.safetensors")
    _, gradients = loss_and_gradients("llama_gqa")
    assert set(gradients) == set(golden)
    for name, gradient in golden.items():
        assert_close(gradients[name], gradient, "float32", "backward")


@pytest.mark.parametrize("name", LLAMAS)
def test_greedy_continuation(name: str) -> None:
    """By a full forward pass for every token, on a row of the final length."""
    golden = reference(name)
    prompt, expected = golden["greedy_prompt"], golden["greedy_ids"]
    start, steps = prompt.shape[1], expected.shape[1]
    ids = np.pad(prompt, ((0, 0), (0, steps)))
    graph, params = nnx.split(model_of(name))
    forward = jax.jit(lambda params, ids: nnx.merge(graph, params)(ids))
    for end in range(start, start + steps):
        ids[:, end] = np.asarray(forward(params, ids))[:, end - 1].argmax(-1)
    np.testing.assert_array_equal(ids[:, start:], expected)


def scaled_config(kind: str, form: str) -> dict[str, Any]:
    """The config of llama_gqa with one RoPE scaling, in the new or the old form."""
    settings = ROPE_SCALED[kind]
    file = "config.json" if form == "new" else "config_legacy.json"
    raw = json.loads((GOLDEN / "llama_gqa" / file).read_text())
    raw["max_position_embeddings"] = settings["max_position_embeddings"]
    if form == "new":
        raw["rope_parameters"] = settings["rope_parameters"]
    else:
        raw["rope_scaling"] = settings["rope_scaling_legacy"]
    return raw


@pytest.mark.parametrize("kind", ROPE_SCALED)
def test_scaled_rope(kind: str, tmp_path: Path) -> None:
    golden = np.load(GOLDEN / "llama_gqa" / "rope_scaled.npz")
    (tmp_path / "config.json").write_text(json.dumps(scaled_config(kind, "new")))
    shutil.copyfile(GOLDEN / "llama_gqa" / "model.safetensors", tmp_path / "model.safetensors")
    model = load_model(tmp_path)
    assert model.config == config_from_json(scaled_config(kind, "old"), "config_legacy.json")
    logits = model(jnp.asarray(golden["input_ids"]))
    assert_close(logits, golden[f"logits_{kind}"], "float32", "forward")


@pytest.mark.parametrize("length", [20, 96])
def test_longrope(length: int) -> None:
    """Short factors up to the original length of 32, long factors above it."""
    golden = np.load(GOLDEN / "llama_gqa" / "rope_longrope.npz")
    settings = json.loads((GOLDEN / "llama_gqa" / "rope_longrope.json").read_text())
    raw = json.loads((GOLDEN / "llama_gqa" / "config.json").read_text()) | settings
    config, weights = config_from_json(raw, "x"), open_weights(GOLDEN / "llama_gqa")
    ids = np.load(GOLDEN / "llama_gqa" / "rope_scaled.npz")["input_ids"][:, :length]
    logits = build(config, weights.read)(jnp.asarray(ids))
    assert_close(logits, golden[f"logits_{length}"], "float32", "forward")


@pytest.mark.parametrize("name", LLAMAS)
def test_old_and_new_config_describe_one_model(name: str) -> None:
    old, new = (
        config_from_json(json.loads((GOLDEN / name / file).read_text()), file)
        for file in ("config_legacy.json", "config.json")
    )
    assert old == new


def test_sharded_weights_are_the_same_weights() -> None:
    one, many = (open_weights(GOLDEN / name) for name in ("llama_gqa", "llama_gqa_sharded"))
    assert one.config == many.config
    for path in one.paths:
        assert_close(many.read(path), one.read(path), "float32", "exact")


def test_query_heads_are_group_major() -> None:
    """Query head q of a checkpoint is head q % G of KV group q // G, in and out."""
    weights = open_weights(GOLDEN / "llama_gqa")
    stored = load_file(GOLDEN / "llama_gqa" / "model.safetensors")
    size, groups = weights.config.head_dim, weights.config.query_heads
    assert groups == 4
    query, output = (weights.read(f"layers/attention/{name}") for name in ("query", "output"))
    for layer in range(weights.config.n_layers):
        prefix = f"model.layers.{layer}.self_attn"
        for head in range(weights.config.n_heads):
            rows = slice(head * size, (head + 1) * size)
            place = (layer, head // groups, head % groups)
            np.testing.assert_array_equal(query[place], stored[f"{prefix}.q_proj.weight"][rows])
            ours = output[place].T
            np.testing.assert_array_equal(ours, stored[f"{prefix}.o_proj.weight"][:, rows])
