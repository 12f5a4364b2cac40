"""Quantization of one matrix by hand and against qwix; models of quantized weights, and files."""

import dataclasses
import functools
import json
from pathlib import Path
from statistics import NormalDist
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from qwix.contrib import awq_core
from safetensors.numpy import load_file, save_file

from sat_jax.compress import (
    InputStatistics,
    LoraSettings,
    Quantization,
    load_adapter,
    merge_factors,
    quantize_matrix,
    save_adapter,
    with_new_adapters,
)
from sat_jax.compress.costs import quantized_costs
from sat_jax.compress.input_statistics import DAMPING
from sat_jax.compress.layers import Matrix, matrices
from sat_jax.compress.lora import adapters_of
from sat_jax.config import Config, ModelConfig
from sat_jax.errors import UserError
from sat_jax.interop import load_model, open_weights, quantized, save_model
from sat_jax.models.build import layout_of
from sat_jax.nn.layout import flat_values, make_layout
from sat_jax.nn.quantized import Quantized, pack, unpack
from sat_jax.train.run_weights import starting_point
from tests.golden_model import logits_of
from tests.small_models import CONFIGS, random_params
from tests.tolerances import assert_close

# Two query heads a KV group, and few sizes of matrices, each of which is compiled.
CONFIG = dataclasses.replace(CONFIGS["gqa"], n_layers=2, n_heads=8, head_dim=2, d_ff=16)
METHOD = Quantization("awq", 4, 8)


@pytest.mark.parametrize(
    ("bits", "group", "largest", "integers", "scales"),
    [
        (4, 0, 7.5, [7, -8, 0, 1, -2, 2], [1]),
        (4, 3, 7.5, [7, -8, 0, 2, -4, 7], [1, 1 / 3]),
        (8, 0, 127.5, [127, -128, 0, 1, -2, 2], [1]),
    ],
)
def test_round_to_nearest_by_hand(
    bits: Any, group: int, largest: float, integers: list[int], scales: list[float]
) -> None:
    """The largest |w| is 7.5 or 127.5 scales, and halves become even. A group of zeros stays 0."""
    row = [largest, -largest, 0.4, 0.6, -1.5, 2.5]
    matrix = quantize_matrix(np.array([row, [0.0] * 6]), np.ones((1, 6)), "rtn", bits, group)
    assert np.asarray(matrix.array.qvalue).astype(int).tolist() == [integers, [0] * 6]
    assert_close(matrix.array.scale[0], np.array(scales), "float32", "product")
    expected = np.repeat(scales, 6 // len(scales)) * integers
    assert_close(matrix.dense(), np.stack([expected, np.zeros(6)]), "float32", "product")


def test_levels_of_normal_float() -> None:
    """By their definition: quantiles of a normal distribution, of 8 negative and 9 positive levels
    with one 0, at equal distances of the probability up to the mean of 1 - 1/30 and 1 - 1/32."""
    last = (1 - 1 / 30 + 1 - 1 / 32) / 2
    half = [
        [NormalDist().inv_cdf(0.5 + (last - 0.5) * n / count) for n in range(1, count + 1)]
        for count in (7, 8)
    ]
    negative, positive = (np.array(levels) / levels[-1] for levels in half)
    levels = np.concatenate([-negative[::-1], [0], positive])
    codes = jnp.asarray(pack(np.arange(16)[None]))
    weight = Quantized(codes, jnp.full((1, 1), 3.0), normal_float=True)
    assert_close(weight.dense()[0], 3 * levels, "float32", "product")


def test_normal_float_by_hand() -> None:
    """The scale of a group is its largest |w|; levels near 0.1 are 0.0796 and 0.1609, near -0.61
    -0.696 and -0.525. A group of zeros stays 0."""
    row = [4.0, 0.4, -2.44, -2.45, 0.0, 0.0, 0.0, 0.0, -0.2, 0.2, 0.01, 0.0]
    matrix = quantize_matrix(np.array([row] * 2), np.ones((1, 12)), "nf4", 4, 4)
    codes = [15, 8, 2, 1, 7, 7, 7, 7, 0, 15, 8, 7]
    assert np.asarray(matrix.array.qvalue).astype(int).tolist() == [codes] * 2
    assert_close(matrix.array.scale, [[4.0, 1.0, 0.2]] * 2, "float32", "product")
    for writes in (False, True):
        shape = (12, 2) if writes else (2, 12)
        stored = Matrix("down", shape, "channel", writes).quantized(matrix)
        assert stored.values.dtype == np.uint8 and stored.shape == shape
        dense = matrix.dense()
        np.testing.assert_array_equal(stored.dense(), dense.T if writes else dense)


def test_gptq_by_hand() -> None:
    """The second column makes up for the error 0.4 of the first by 0.4 · ⟨x₀, x₁⟩ / ⟨x₁, x₁⟩, which
    rounds 1.45 up. The scale of a group is that of its weights after such changes."""
    inputs = np.array([[1.0, 2.0, 0.0, 0.0], [0.0, 2.0, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0]])
    added = 0.4 * 2 / (8 + DAMPING * (1 + 8 + 1 + 1) / 4)
    weight = np.array([[0.4, 1.45, 7.5, 0.0]] * 2)
    nearest, gptq = (quantize_matrix(weight, inputs, name, 4, 0) for name in ("rtn", "gptq"))
    assert np.asarray(nearest.array.qvalue).astype(int).tolist() == [[0, 1, 7, 0]] * 2
    assert np.asarray(gptq.array.qvalue).astype(int).tolist() == [[0, 2, 7, 0]] * 2
    # The columns in another order: 0.4 and its correlated column are in different groups.
    order = [0, 2, 1, 3]
    gptq = quantize_matrix(weight[:, order], inputs[:, order], "gptq", 4, 2)
    scales = np.array([[1, (1.45 + added) / 7.5]] * 2)
    assert_close(gptq.array.scale, scales, "float32", "product")


@functools.cache
def data() -> tuple[np.ndarray, np.ndarray]:
    """A weight `[16, 32]` and 400 inputs with columns that are correlated and differ in size."""
    rng = np.random.default_rng(0)
    mix = rng.normal(size=(32, 32)) * 2.0 ** -(np.arange(32) / 4)
    return rng.normal(size=(16, 32)).astype(np.float32), rng.normal(size=(400, 32)) @ mix


def test_errors_of_outputs_with_correlated_inputs() -> None:
    weight, inputs = data()
    rtn, gptq, awq = (
        np.linalg.norm((quantize_matrix(weight, inputs, name, 4, 8).dense() - weight) @ inputs.T)
        for name in ("rtn", "gptq", "awq")
    )
    assert gptq < awq < rtn < 0.11 * np.linalg.norm(weight @ inputs.T)


def test_awq_is_that_of_qwix_where_inputs_are_not_correlated() -> None:
    """Inputs ±c of each column have the root mean square c, which is mean |x|; for such inputs,
    qwix minimizes the error of the outputs too."""
    weight, _ = data()
    signs = np.array([[1.0]])
    for _ in range(5):
        signs = np.block([[signs, signs], [signs, -signs]])
    inputs = signs * np.geomspace(0.01, 3, 32)
    how = awq_core.qarray.HowToQuantize(qtype=jnp.int4, channelwise_axes=(0,), tiled_axes={1: 8})
    size = jnp.asarray(np.abs(inputs).mean(0), jnp.float32)
    expected = awq_core.search_optimal_scales(jnp.asarray(weight), size, how)
    scale = quantize_matrix(weight, inputs, "awq", 4, 8).input_scale
    assert scale is not None and 10 < scale.max() / scale.min() < 300
    assert_close(1 / scale, expected[0], "float32", "product")


def test_two_integers_share_a_byte() -> None:
    packed = pack(np.array([-8, 7, 1, -1], np.int8))
    assert packed.tolist() == [8 | 1 << 4, 7 | 15 << 4]
    every = np.arange(-8, 8, dtype=np.int8).reshape(2, 8)
    assert np.asarray(unpack(jnp.asarray(pack(every)))).tolist() == every.tolist()


@functools.cache
def weights() -> dict[str, Any]:
    """A model's parameters by path, with `Quantized` matrices of all layers."""
    values: dict[str, Any] = dict(random_params(CONFIG))
    for matrix in matrices(layout_of(CONFIG)):
        input_scale = jnp.geomspace(0.1, 9, matrix.columns)
        layers = []
        for weight in values[matrix.path]:
            flat = matrix.flatten(jnp.asarray(weight))
            nearest = Quantization("rtn", 4, 8)(flat, InputStatistics(0, np.zeros(0))).quantized
            assert nearest is not None
            scaled = nearest._replace(input_scale=input_scale)
            stored = matrix.quantized(scaled)
            assert stored.shape == matrix.shape
            assert_close(stored.dense(), matrix.unflatten(scaled.dense()), "float32", "exact")
            layers.append(stored)
        values[matrix.path] = jax.tree.map(lambda *arrays: np.stack(arrays), *layers)
    return values


def test_the_arrays_of_a_quantized_model() -> None:
    """Their axes are named and frozen, and their size is that of `quantized_costs`."""
    layout = layout_of(CONFIG)
    model = layout.bind(weights())
    arrays = flat_values(model)
    described = make_layout(model)
    assert described.leaves.keys() == arrays.keys() > {"embed", "layers/mlp/down/input_scale"}
    for path, leaf in described.leaves.items():
        assert len(leaf.axes) == arrays[path].ndim
        assert leaf.trained == (path in layout.leaves)
    costs = quantized_costs(layout, METHOD, 8, 4)
    assert costs["bytes"]["after"] == sum(array.nbytes for array in arrays.values())
    count = costs["weights"]["in_matrices"]
    # 4 bits, 32 for 8 weights, and 32 for an input
    inputs = sum(CONFIG.n_layers * matrix.columns for matrix in matrices(layout))
    assert costs["bits_per_weight"]["in_matrices"] == (8 * count + 32 * inputs) / count
    down = jax.tree.map(lambda array: jnp.asarray(array[0]), weights()["layers/mlp/down"])
    assert isinstance(down, Quantized)
    assert down.combine(jnp.ones((1, 1, 16), jnp.bfloat16)).dtype == jnp.bfloat16


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    model, settings = layout_of(CONFIG).bind(weights()), METHOD.file_settings
    quantized.write_directory(
        tmp_path / "model", CONFIG, model, settings, dtype="float32", files={}, generation={}
    )
    return tmp_path / "model"


def test_a_quantized_directory(directory: Path, tmp_path: Path) -> None:
    """The loaded model computes with the stored arrays, and has the logits of the directory with
    its dequantized weights."""
    model = load_model(directory)
    stored = load_file(directory / "quantized.safetensors")
    assert stored.keys() == flat_values(model).keys()
    for path, array in flat_values(model).items():
        assert array.dtype == stored[path].dtype
        np.testing.assert_array_equal(array, stored[path])
    save_model(merge_factors(model), tmp_path / "dense")
    dense = load_model(tmp_path / "dense")
    logits = [logits_of(range(12), 12, each) for each in (model, dense)]
    assert_close(*logits, "float32", "forward")
    read = open_weights(directory).read("layers/mlp/down")
    assert_close(read, flat_values(dense)["layers/mlp/down"], "float32", "exact")
    with pytest.raises(UserError, match="layers/attention/key is not one array; accepted: a model"):
        save_model(model, tmp_path / "again")


def test_adapters_of_a_quantized_model(directory: Path, tmp_path: Path) -> None:
    """They are written and read, and have the gradients of those on dequantized bases."""
    model = load_model(directory)
    adapted = with_new_adapters(model, LoraSettings(rank=2, targets=("down",), dora=True))
    save_adapter(adapted, tmp_path / "adapter")
    again = load_adapter(model, tmp_path / "adapter")
    for path, array in flat_values(adapted).items():
        np.testing.assert_array_equal(flat_values(again)[path], array)
    trained = {path for path, leaf in make_layout(again).leaves.items() if leaf.trained}
    assert "layers/mlp/down/update/left" in trained > {"embed"}
    assert "layers/mlp/down/base/values" not in trained
    (lora,) = adapters_of(again).values()
    lora = jax.tree.map(lambda array: array[0], lora)
    a = jnp.ones((1, 1, 16))

    def loss(update: Any, base: Any) -> jax.Array:
        return jnp.sum(dataclasses.replace(lora, base=base, update=update).combine(a) ** 2)

    gradients = [jax.grad(loss)(lora.update, base).right for base in (lora.base, lora.base.dense())]
    assert np.abs(gradients[0]).max() > 0
    assert_close(*gradients, "float32", "backward")


def test_quantized_weights_are_not_trained(directory: Path) -> None:
    config = dataclasses.replace(Config(), model=ModelConfig(path=str(directory)))
    with pytest.raises(UserError, match=r"model.path .* with lora.rank 0: .* \(int4\); accepted"):
        starting_point(config)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 8}, r"key/values is U8 \[2, 4, 2, 8\]; accepted: I8 \[2, 4, 2, 16\]"),
        ({"group": 4}, r"key/scale is F32 \[2, 4, 2, 2\]; accepted: F32 \[2, 4, 2, 4\]"),
        ({"input_scale": False}, "key/input_scale is no tensor of this model; accepted"),
        (
            {"group": "all"},
            "quantization_config = .* is not supported; accepted: what scripts.comp",
        ),
        ({"normal_float": 1}, "quantization_config = .* is not supported; accepted"),
        ({"quant_method": "gptq"}, "quantization_config = .* is not supported; accepted"),
    ],
)
def test_settings_that_do_not_fit(directory: Path, change: dict[str, Any], message: str) -> None:
    file = directory / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"] |= change
    file.write_text(json.dumps(config))
    with pytest.raises(UserError, match=message):
        open_weights(directory)


def test_files_that_do_not_fit(directory: Path) -> None:
    file = directory / "quantized.safetensors"
    tensors = load_file(file)
    del tensors["layers/mlp/up/scale"]
    save_file(tensors, file)
    with pytest.raises(UserError, match="layers/mlp/up/scale is missing"):
        open_weights(directory)
    file.write_bytes(b"no")
    with pytest.raises(UserError, match="cannot be read as safetensors"):
        open_weights(directory)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "gguf"}, "method 'gguf'; accepted: rtn, gptq, awq"),
        ({"bits": 3}, "bits 3; accepted: 4 or 8"),
        ({"method": "nf4", "bits": 8}, "bits 8: nf4 has 16 levels; accepted: 4"),
        ({"group": -1}, "group -1; accepted: a number of inputs, or 0 for all"),
        ({"group": 20}, "group 20: weight has 32 columns; accepted: divisors, such as 16, or 0"),
        ({"weight": np.ones((3, 32))}, "bits 4: weight is 3 × 32; accepted: even numbers"),
        ({"inputs": np.full((5, 32), np.inf)}, "inputs have values that are not finite"),
    ],
)
def test_misuse_is_a_user_error(options: dict[str, Any], message: str) -> None:
    weight, inputs = data()
    with pytest.raises(UserError, match=message):
        quantize_matrix(**{"weight": weight, "inputs": inputs, "group": 8} | options)
