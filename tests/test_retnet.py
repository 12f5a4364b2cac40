"""RetNet computes what torchscale computes (tests/golden), decodes with a state, and trains."""

import dataclasses
import functools
import itertools
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

from sat_jax.config_values import default_config, from_config_dict
from sat_jax.errors import UserError
from sat_jax.evaluate.generate import generate
from sat_jax.interop import load_model, open_weights, save_model
from sat_jax.models import registry
from sat_jax.models.build import build, layout_of
from sat_jax.models.presets import preset
from sat_jax.nn.decoder import Decoder
from sat_jax.nn.layout import flat_values
from sat_jax.nn.loss import next_token_loss
from sat_jax.nn.retention import chunk_of
from sat_jax.sparsity.flops import forward_flops, traced_flops
from sat_jax.sparsity.plan import make_plan, neurons_of
from sat_jax.train.setup import set_up
from tests.conftest import slow_after
from tests.small_models import random_params
from tests.test_gpt_models import rows
from tests.tolerances import assert_close

GOLDEN = Path(__file__).parent / "golden" / "retnet"


@functools.cache
def reference() -> Mapping[str, np.ndarray]:
    return dict(np.load(GOLDEN / "reference.npz"))


@functools.cache
def model_of(normalization: str = "absolute_sum") -> Decoder:
    weights = open_weights(GOLDEN)
    fields: Any = {"normalization": normalization}
    return build(dataclasses.replace(weights.config, **fields), weights.read)


@functools.cache
def logits_of(normalization: str) -> jax.Array:
    """Return the logits of the whole rows."""
    graph, state = nnx.split(model_of(normalization))
    tokens = jnp.asarray(reference()["tokens"])
    return jax.jit(lambda state: nnx.merge(graph, state)(tokens))(state)


def test_logits_of_a_directory_are_those_of_the_parallel_form() -> None:
    model = load_model(GOLDEN)
    assert (model.config.normalization, model.config.chunk) == ("absolute_sum", 8)
    logits = model(jnp.asarray(reference()["tokens"]))
    assert_close(logits, reference()["logits_git"], "float32", "forward")


@pytest.mark.parametrize(
    ("normalization", "name"), [("sum", "logits_pypi"), ("decay", "logits_recurrent")]
)
def test_logits_by_normalization(normalization: str, name: str) -> None:
    assert_close(logits_of(normalization), reference()[name], "float32", "forward")


def test_loss_and_gradient_norms() -> None:
    model, golden = model_of(), reference()
    layout, part = layout_of(model.config), rows(golden["tokens"])
    values = flat_values(model)
    trained = {path: x for path, x in values.items() if layout.leaves[path].trained}
    assert set(values) - set(trained) == {"angle", "layers/retention/log_decay"}

    def mean_loss(trained: dict[str, jax.Array]) -> jax.Array:
        bound = layout.bind({**values, **trained})
        return next_token_loss(bound, *part)[0] / part.tokens.size

    loss, gradients = jax.jit(jax.value_and_grad(mean_loss))(trained)
    assert_close(loss, golden["loss"], "float32", "forward")
    norms = {}
    for stored in registry.format_of(model.config).stored_tensors(layout.shapes, "huggingface"):
        (path,) = stored.tensor.paths
        if path in trained:
            layer = ... if stored.layer is None else stored.layer
            norms[stored.name] = np.linalg.norm(np.asarray(gradients[path])[layer])
    desired = dict(zip(golden["grad_names"].tolist(), golden["grad_norms"], strict=True))
    assert norms.keys() == desired.keys()
    for name, norm in desired.items():
        # The norm of a head amplifies rounding: up to 3.5e-6.
        assert_close(norms[name], norm, "float32", "retention")


def test_operations_by_hand() -> None:
    """2 layers of 4 heads with keys of 16 and values of 32, width 64, chunks of 32 tokens."""
    config, length = preset("retnet-tiny"), 64
    layout = layout_of(config)
    matrices = 2 * 2 * (2 * 64 * 64 + 6 * 64 * 128)
    state = 2 * 4 * 2 * 2 * 16 * 32
    counted = forward_flops(layout, length)
    assert counted.mixing == 2 * 4 * (16 + 32) * (32 + 1) + state
    assert counted.read + counted.write == matrices
    # The program computes all pairs of a chunk, of which half are masked.
    tokens = jax.ShapeDtypeStruct((1, length), jnp.int32)
    traced = traced_flops(lambda values, ids: layout.bind(values)(ids), layout.shapes, tokens)
    pairs = 2 * 4 * (16 + 32) * 2 * 32
    assert traced == length * (matrices + state + pairs + counted.head)


@pytest.mark.parametrize(
    ("head", "tokens"),
    [((16, 32), 32), ((32, 54), 64), ((256, 432), 512), ((320, 540), 512), ((2, 2), 16)],
)
def test_chunks_cost_no_more_than_the_state(head: tuple[int, int], tokens: int) -> None:
    """(16 + 32) · 32 pairs are 1,536 operations, 4 · 16 · 32 of the state 2,048."""
    assert chunk_of(*head) == tokens


def test_attention_backends_are_refused(tmp_path: Path) -> None:
    text = tmp_path / "a.txt"
    text.write_text("some text\n" * 100)
    config = default_config()
    config.model.preset, config.model.attention = "retnet-tiny", "xla"
    config.data.sources, config.data.tokenizer = (str(text),), "bytes"
    with pytest.raises(UserError, match=r"model\.attention=xla: a retnet model has no attention"):
        set_up(from_config_dict(config), print)


# --- Decoding ---


@functools.partial(jax.jit, static_argnames="graph")
def extend(graph: Any, state: Any, cache: Any, part: jax.Array, start: int) -> Any:
    """Return the logits of more tokens, and the cache with them."""
    model = nnx.merge(graph, state)
    positions = jnp.broadcast_to(start + jnp.arange(part.shape[1])[None], part.shape)
    x, cache = model.extend(cache, part, jnp.ones_like(part), positions)
    return jnp.einsum("BTD,VD->BTV", x, model.head()), cache


@pytest.mark.parametrize(
    ("normalization", "cuts"),
    slow_after(
        1,
        ("decay", (0, 11, 24, *range(25, 40))),
        ("sum", (0, 24, *range(25, 40))),
        ("absolute_sum", tuple(range(40))),
    ),
)
def test_decoding_is_the_parallel_form(normalization: str, cuts: tuple[int, ...]) -> None:
    model, tokens = model_of(normalization), jnp.asarray(reference()["tokens"])
    cache, parts = model.empty_cache(2, 40), []
    for start, stop in itertools.pairwise((*cuts, 40)):
        logits, cache = extend(*nnx.split(model), cache, tokens[:, start:stop], start)
        parts.append(logits)
    logits = jnp.concatenate(parts, axis=1)
    assert_close(logits, logits_of(normalization), "float32", "retention")
    if normalization == "absolute_sum":  # as torchscale decodes
        assert_close(logits, reference()["logits_recurrent"], "float32", "forward")
    else:
        assert_close(logits, logits_of(normalization), "float32", "forward")
    np.testing.assert_array_equal(cache.arrays["tokens"], np.full((2, 2), 40))


def test_memory_of_decoding_does_not_depend_on_the_length() -> None:
    model = model_of("sum")

    def bytes_of_a_step(slots: int) -> tuple[int, ...]:
        def step(cache: Any, token: jax.Array) -> Any:
            return model.extend(cache, token, jnp.ones_like(token), token * 0 + 7)

        cache = jax.eval_shape(lambda: model.empty_cache(2, slots))
        token = jax.ShapeDtypeStruct((2, 1), jnp.int32)
        sizes = jax.jit(step).lower(cache, token).compile().memory_analysis()
        return (
            sizes.argument_size_in_bytes,
            sizes.output_size_in_bytes,
            sizes.temp_size_in_bytes,
        )

    assert bytes_of_a_step(64) == bytes_of_a_step(65_536)


def test_generation_continues_with_the_likeliest_token() -> None:
    model, prompt = model_of("decay"), reference()["tokens"][0, :20].tolist()
    ids, likeliest = list(prompt), jax.jit(lambda tokens: jnp.argmax(model(tokens)[0], axis=-1))
    for last in range(19, 25):
        row = jnp.asarray([ids + [0] * (26 - len(ids))])  # what follows has no effect
        ids.append(int(likeliest(row)[last]))
    # Beside a longer prompt, so that this one is padded on the left.
    longer = reference()["tokens"][1, :33].tolist()
    assert generate(model, [prompt, longer], 6, stop_ids=())[0] == ids[20:]


# --- Files ---


def test_a_saved_directory_has_the_same_tensors(tmp_path: Path) -> None:
    out = tmp_path / "out"
    save_model(load_model(GOLDEN), out)
    names = {path.name for path in out.iterdir()}
    assert names == {"decoder_config.json", "decoder.safetensors", "generation_config.json"}
    written, golden = (load_file(place / "decoder.safetensors") for place in (out, GOLDEN))
    assert written.keys() == golden.keys()
    for name, array in golden.items():
        np.testing.assert_array_equal(written[name], array, err_msg=name, strict=True)
    assert open_weights(out).config == open_weights(GOLDEN).config


def test_a_tied_head_is_written_for_a_strict_load(tmp_path: Path) -> None:
    """torchscale has the tied matrix under both names."""
    config = preset("retnet-tiny")
    values = random_params(config)
    save_model(build(config, values.__getitem__), tmp_path / "out")
    written = load_file(tmp_path / "out/decoder.safetensors")
    np.testing.assert_array_equal(written["embed_tokens.weight"], values["embed"])
    np.testing.assert_array_equal(written["output_projection.weight"], values["embed"])
    reread = open_weights(tmp_path / "out")
    assert reread.config == config
    np.testing.assert_array_equal(reread.read("embed"), values["embed"])


def test_a_normalization_is_kept_in_files(tmp_path: Path) -> None:
    save_model(model_of("decay"), tmp_path / "out")
    reread, tokens = load_model(tmp_path / "out"), jnp.asarray(reference()["tokens"])
    assert reread.config.normalization == "decay"
    assert_close(reread(tokens), model_of("decay")(tokens), "float32", "exact")


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("num_key_value_heads", 2, "num_key_value_heads = 2 is not supported; accepted: null"),
        ("rope_scaling", {"factor": 2}, "rope_scaling = .* is not supported; accepted: null"),
        ("rope_parameters", {"factor": 2}, "rope_parameters = .* is not supported; accepted: null"),
        ("deepnorm", True, "deepnorm = true is not supported; accepted: false"),
        ("activation_fn", "relu", 'activation_fn = "relu" is not supported; accepted: gelu, swish'),
        ("decoder_retention_heads", 3, "decoder_embed_dim = 64 .*a multiple of 6"),
        ("retention_normalization", "l2", "accepted: decay, sum, absolute_sum"),
    ],
)
def test_a_refused_field_is_named(tmp_path: Path, field: str, value: Any, message: str) -> None:
    raw = json.loads((GOLDEN / "decoder_config.json").read_text()) | {field: value}
    (tmp_path / "decoder_config.json").write_text(json.dumps(raw))
    shutil.copyfile(GOLDEN / "decoder.safetensors", tmp_path / "decoder.safetensors")
    with pytest.raises(UserError, match=message):
        open_weights(tmp_path)


def test_query_heads_are_no_unit_of_retention() -> None:
    neurons = neurons_of(layout_of(preset("retnet-tiny")))
    assert [unit.name for unit in neurons.units] == ["channel", "head"]
    with pytest.raises(
        UserError, match=r"sparsity\.attention_unit 'query_head': the units of this"
    ):
        make_plan(neurons, 0.5, 0.5, attention_unit="query_head")
