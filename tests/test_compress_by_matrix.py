"""Methods whose settings differ by matrix: the compressed model, and its files."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from sat_jax.compress import Factorization, Pruning, Quantization, load_factored, merge_factors
from sat_jax.compress.costs import quantized_costs
from sat_jax.compress.factors import FACTORS_FILE, factors_file
from sat_jax.compress.layers import (
    CompressedLayer,
    compress_layers,
    matrices,
    stack_layers,
    with_equal_bits,
)
from sat_jax.compress.method import ByMatrix, MatrixMethod
from sat_jax.errors import UserError
from sat_jax.interop import load_model, open_weights, quantized, save_model
from sat_jax.models.build import layout_of
from sat_jax.nn.layout import flat_values
from tests.golden_model import logits_of
from tests.small_models import CONFIGS, batch, random_params
from tests.tolerances import assert_close

CONFIG = dataclasses.replace(CONFIGS["gqa"], n_layers=2, n_heads=8, head_dim=2, d_ff=16)
LAYOUT = layout_of(CONFIG)
KEY, DOWN, UP = "layers/attention/key", "layers/mlp/down", "layers/mlp/up"


def compressed(
    method: Callable[[Any], MatrixMethod], default: Any, special: dict[str, list[Any]]
) -> tuple[dict[str, np.ndarray], list[CompressedLayer], ByMatrix]:
    """Return the compressed values, the layers, and the methods; `special` has settings by path."""
    values = {path: np.array(value) for path, value in random_params(CONFIG).items()}
    settings = {m.path: special.get(m.path, [default] * 2) for m in matrices(LAYOUT)}
    methods = {
        path: [None if s is None else method(s) for s in of_path]
        for path, of_path in settings.items()
    }
    chosen = ByMatrix(methods, "nothing")
    return values, list(compress_layers(LAYOUT, values, [batch(CONFIG)], chosen)), chosen


def test_each_matrix_has_its_own_sparsity() -> None:
    special = {KEY: [0.25, 0.75], UP: [None, 0.5]}
    values, layers, _ = compressed(lambda s: Pruning("magnitude", s), 0.5, special)
    for path, expected in (KEY, [0.25, 0.75]), (UP, [0, 0.5]), (DOWN, [0.5, 0.5]):
        assert [float((layer == 0).mean()) for layer in values[path]] == expected
        assert [layer.removed[path] / values[path][0].size for layer in layers] == expected


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A quantized model, some of whose matrices have 8 bits, and all layers of `up`."""
    special = {KEY: [8, 4], DOWN: [4, 8], UP: [8, 8]}
    values, layers, chosen = compressed(lambda bits: Quantization("rtn", bits, 8), 4, special)
    stacked = stack_layers(with_equal_bits([layer.quantized for layer in layers]))
    model = LAYOUT.bind(jax.tree.map(jnp.asarray, values | stacked))
    bits = {path: [one.bits for one in of] for path, of in chosen.methods.items()}  # type: ignore
    settings = Quantization("rtn", group=8).file_settings | {"bits": bits}
    quantized.write_directory(
        tmp_path / "model", CONFIG, model, settings, dtype="float32", files={}, generation={}
    )
    tensors = load_file(tmp_path / "model" / "quantized.safetensors")
    size = sum(tensor.nbytes for tensor in tensors.values())
    assert quantized_costs(LAYOUT, chosen, 8, 4)["bytes"]["after"] == size
    read = open_weights(tmp_path / "model").read
    for path, value in values.items():
        assert_close(read(path), value, "float32", "exact")
    return tmp_path / "model"


def test_a_directory_with_bits_by_matrix(directory: Path) -> None:
    """Layers of 4 bits are packed in the file, beside those of 8, and loaded in one array."""
    model, tensors = load_model(directory), load_file(directory / "quantized.safetensors")
    arrays = flat_values(model)
    assert tensors[f"{KEY}/values_4"].dtype == np.uint8
    assert len(tensors[f"{KEY}/values_4"]) == len(tensors[f"{KEY}/values_8"]) == 1
    assert arrays[f"{KEY}/values"].dtype == tensors[f"{UP}/values"].dtype == np.int8
    assert arrays["layers/mlp/gate/values"].dtype == np.uint8
    for path, (layer_4, layer_8) in {KEY: (1, 0), DOWN: (0, 1)}.items():
        largest = np.abs(np.asarray(arrays[f"{path}/values"])).max(axis=(1, 2))[:2]
        assert np.max(largest[layer_4]) <= 8 < np.max(largest[layer_8])
    dense = merge_factors(model)
    assert_close(*(logits_of(range(12), 12, m) for m in (model, dense)), "float32", "forward")
    assert open_weights(directory).quantized == ("int4", "int8")


@pytest.mark.parametrize(
    ("path", "bits", "message"),
    [
        (KEY, [8, 8], "layers/attention/key/values is missing"),
        (KEY, [4, 3], "quantization_config = .* is not supported; accepted: what scripts.compress"),
        (KEY, [8], "quantization_config = .* is not supported; accepted"),
        ("layers/mlp/side", [8, 4], "quantization_config = .* is not supported; accepted"),
    ],
)
def test_bits_that_do_not_fit(directory: Path, path: str, bits: list[int], message: str) -> None:
    file = directory / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"]["bits"][path] = bits
    file.write_text(json.dumps(config))
    with pytest.raises(UserError, match=message):
        open_weights(directory)


def test_factors_of_different_ranks(tmp_path: Path) -> None:
    """The model with factors has a segment for each layer, and the logits of the merged one."""
    special = {KEY: [0.5, None], DOWN: [None, None]}
    values, layers, _ = compressed(lambda ratio: Factorization("svd", ratio), 0.8, special)
    merged = LAYOUT.bind({path: jnp.asarray(value) for path, value in values.items()})
    save_model(merged, tmp_path / "model")
    factors = factors_file([layer.factors for layer in layers], "float32")
    (tmp_path / "model" / FACTORS_FILE).write_bytes(factors)
    names = load_file(tmp_path / "model" / FACTORS_FILE).keys()
    assert {f"{KEY}/0/left", f"{UP}/1/right"} <= names
    assert not names & {f"{KEY}/1/left", f"{DOWN}/0/left"}
    factored = load_factored(tmp_path / "model")
    again = merge_factors(factored)
    for model in (factored, again):
        logits = [logits_of(range(12), 12, each) for each in (model, merged)]
        assert_close(*logits, "float32", "forward")
    assert flat_values(again)[KEY].shape == values[KEY].shape
