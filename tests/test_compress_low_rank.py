"""Low rank: factors of one matrix against identities of the SVD, and models of such weights."""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np
import pytest

from sat_jax.compress import Factorization, InputStatistics, factorize_matrix, input_statistics
from sat_jax.compress.layers import matrices
from sat_jax.compress.low_rank import LOW_RANK
from sat_jax.errors import UserError
from sat_jax.models.build import layout_of
from sat_jax.models.decoder_config import DecoderConfig
from sat_jax.models.gpt2 import GPT2Config
from sat_jax.nn.layout import make_layout
from sat_jax.nn.low_rank import LowRank
from tests.executions import plain
from tests.small_models import CONFIGS, random_params
from tests.tolerances import assert_close

RANK = 3
NOTHING = InputStatistics(0, np.zeros(0))


@functools.cache
def data() -> tuple[np.ndarray, np.ndarray]:
    """A weight `[12, 8]` and 60 inputs with columns that are correlated and differ in size."""
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(60, 8)) @ (rng.normal(size=(8, 8)) * 2.0 ** -np.arange(8))
    return rng.normal(size=(12, 8)), inputs


def product(method: str, weight: np.ndarray, inputs: np.ndarray, rank: int = RANK) -> np.ndarray:
    """The product of the factors, in float64."""
    needs, factorize = LOW_RANK[method]
    left, right = factorize(weight, InputStatistics.of_inputs(inputs, needs), rank)
    assert (left.shape, right.shape) == ((len(weight), rank), (rank, weight.shape[1]))
    return left @ right


def test_svd_keeps_the_largest_singular_values() -> None:
    """Eckart–Young: the error is the norm of those that are dropped."""
    rng = np.random.default_rng(1)
    left, _ = np.linalg.qr(rng.normal(size=(9, 4)))
    right, _ = np.linalg.qr(rng.normal(size=(6, 4)))
    weight = (left * [2.0, 5.0, 1.0, 3.0]) @ right.T
    approximation = product("svd", weight, np.ones((1, 6)), 2)
    kept = [1, 3]
    assert_close(
        approximation, (left[:, kept] * [5.0, 3.0]) @ right[:, kept].T, "float64", "forward"
    )
    assert_close(np.linalg.norm(weight - approximation), np.sqrt(2**2 + 1**2), "float64", "forward")


def test_a_matrix_of_lower_rank_is_exact() -> None:
    inputs = np.ones((1, 6))
    weight = np.outer([1.0, 2.0, 0.0, -1.0], [3.0, 0.0, 1.0, 0.0, 1.0, 2.0])
    assert_close(product("svd", weight, inputs), weight, "float64", "forward")
    assert_close(product("svd", 0 * weight, inputs), 0 * weight, "float64", "forward")


@pytest.mark.parametrize("damping", [0.0, 0.01])
def test_whitened_singular_values_are_the_error(
    monkeypatch: pytest.MonkeyPatch, damping: float
) -> None:
    """Without damping, the error of the outputs W · Xᵀ is the norm of their dropped singular
    values: no outputs of this rank are nearer. Damping adds inputs √λ · I."""
    monkeypatch.setattr(input_statistics, "DAMPING", damping)
    weight, inputs = data()
    extra = np.sqrt(damping * np.square(inputs).sum() / 8) * np.eye(8)
    columns = np.concatenate([inputs, extra]).T
    dropped = np.linalg.svd(weight @ columns, compute_uv=False)[RANK:]
    error = (weight - product("svd-llm", weight, inputs)) @ columns
    assert_close(np.linalg.norm(error), np.linalg.norm(dropped), "float64", "forward")


def test_asvd_of_inputs_of_one_size_is_svd() -> None:
    weight, inputs = data()
    equal = 3 * np.sign(inputs)
    expected = product("svd", weight, equal)
    assert_close(product("asvd", weight, equal), expected, "float64", "forward")
    assert np.abs(product("asvd", weight, inputs) - expected).max() > 0.1


@pytest.mark.parametrize(("second", "kept"), [(2.0, 1), (1.0, 0)])
def test_asvd_by_hand(second: float, kept: int) -> None:
    """Mean |x| is 1, 4 and 0, so that columns are compared times 1, √4 and 0."""
    weight = np.array([[3.0, 0.0, 7.0], [0.0, second, 7.0]])
    inputs = np.array([[2.0, -4.0, 0.0], [0.0, 4.0, 0.0]])
    expected = np.zeros((2, 3))
    expected[kept, kept] = weight[kept, kept]
    assert_close(product("asvd", weight, inputs, 1), expected, "float64", "forward")


def test_errors_of_outputs_with_correlated_inputs() -> None:
    weight, inputs = data()
    errors = {
        name: np.linalg.norm((weight - product(name, weight, inputs)) @ inputs.T)
        for name in LOW_RANK
    }
    assert errors["svd-llm"] < errors["asvd"] < errors["svd"]


@pytest.mark.parametrize(("ratio", "rank"), [(0.5, 2), (0.99, 4), (0.01, 1)])
def test_the_rank_follows_from_the_ratio(ratio: float, rank: int) -> None:
    """⌊ratio · 96 / 20⌋, at least 1."""
    weight, inputs = data()
    left, right = factorize_matrix(weight.astype(np.float16), inputs, "svd", ratio)
    assert (left.shape, right.shape) == ((12, rank), (rank, 8))
    assert left.dtype == right.dtype == np.float16
    assert Factorization("svd", ratio).count(12, 8) == 96 - 20 * rank


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "qr"}, "method 'qr'; accepted: svd, asvd, svd-llm"),
        ({"ratio": 1.0}, r"ratio 1; accepted: a share between 0 and 1 \(with 1 and more, factors"),
        ({"ratio": 0.0}, "ratio 0; accepted: a share between 0 and 1"),
        ({"weight": np.ones((1, 8))}, "ratio 0.8: weight is 1 × 8, and factors of rank 1 have 9"),
        ({"inputs": np.ones((5, 7))}, r"weight \[12, 8\] and inputs \[5, 7\]; accepted"),
        ({"inputs": np.full((5, 8), np.inf)}, "inputs have values that are not finite"),
    ],
)
def test_misuse_is_a_user_error(options: dict[str, Any], message: str) -> None:
    weight, inputs = data()
    with pytest.raises(UserError, match=message):
        factorize_matrix(**{"weight": weight, "inputs": inputs} | options)


FAMILIES: dict[str, DecoderConfig] = {
    "gqa": dataclasses.replace(CONFIGS["gqa"], n_layers=2),
    "gpt2": GPT2Config(vocab_size=32, d_model=16, n_layers=2, n_heads=4, d_ff=24, max_positions=32),
}


def factored(config: DecoderConfig) -> dict[str, Any]:
    """A model's parameters by path, with `LowRank` weights of all layers."""
    values: dict[str, Any] = dict(random_params(config))
    for matrix in matrices(layout_of(config)):
        layers = []
        for weight in values[matrix.path]:
            factors = Factorization("svd", 0.6)(matrix.flatten(weight), NOTHING).factors
            assert factors is not None
            layers.append(matrix.low_rank(factors))
        values[matrix.path] = jax.tree.map(lambda *arrays: np.stack(arrays), *layers)
    return values


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_of_low_rank_equals_the_merged_one(family: str) -> None:
    """Outputs, and gradients: those of the factors, which alone are trained, follow from the
    gradient of their product."""
    config = FAMILIES[family]
    weights = {p: w for p, w in factored(config).items() if isinstance(w, LowRank)}
    dense_layout, params = layout_of(config), random_params(config)
    layout = make_layout(dense_layout.bind(params | weights))
    merged = {path: np.asarray(weight.dense()) for path, weight in weights.items()}
    assert {path: w.shape for path, w in merged.items()} == {p: params[p].shape for p in merged}
    parts = {
        f"{path}/{name}": getattr(weight, name)
        for path, weight in weights.items()
        for name in ("left", "right")
    }
    unchanged = {path: value for path, value in params.items() if path not in weights}
    assert layout.leaves.keys() == parts.keys() | unchanged.keys()
    assert all(layout.leaves[path].trained for path in parts)
    low, dense = plain(layout, parts | unchanged), plain(dense_layout, unchanged | merged)
    assert_close(low.logits, dense.logits, "float32", "forward")
    for path, weight in weights.items():
        left, right = (np.asarray(part, np.float64) for part in (weight.left, weight.right))
        flat = np.asarray(dense.gradients[path], np.float64).reshape(len(left), -1, right.shape[-1])
        of_left = np.einsum("lnd,lrd->lnr", flat, right).reshape(left.shape)
        of_right = np.einsum("lnd,lnr->lrd", flat, left.reshape(len(left), -1, weight.rank))
        assert_close(low.gradients[f"{path}/left"], of_left, "float32", "backward")
        assert_close(low.gradients[f"{path}/right"], of_right, "float32", "backward")
