"""Weights of low rank: what they keep of a matrix, and what they predict of a model."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from sat_jax.models.build import layout_of
from sat_jax.nn.low_rank import RANK, low_rank
from sat_jax.sparsity.statistics import Statistics
from sat_jax.train.probe import observe_batch
from tests.small_models import CONFIGS, batch, random_params
from tests.tolerances import assert_close


def test_a_matrix_of_that_rank_is_exact() -> None:
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(40, 3)) @ rng.normal(size=(3, 24))
    basis, coordinates = low_rank(jnp.asarray(weight), 3)
    assert_close(coordinates @ basis.T, weight, "float32", "forward")
    assert_close(basis.T @ basis, np.eye(3), "float32", "forward")


def test_other_matrices_keep_their_largest_singular_values() -> None:
    rng = np.random.default_rng(1)
    left, _ = np.linalg.qr(rng.normal(size=(30, 10)))
    right, _ = np.linalg.qr(rng.normal(size=(20, 10)))
    values = np.array([9, 8, 7, 6, *[0.05] * 6])
    basis, coordinates = low_rank(jnp.asarray((left * values) @ right.T), 4)
    assert_close(
        coordinates @ basis.T, (left[:, :4] * values[:4]) @ right[:, :4].T, "float32", "forward"
    )


@functools.cache
def seen(*kinds: str) -> Statistics:
    """Of a model whose gate, up and value matrices have rank `RANK` at most."""
    config = CONFIGS["mha"]
    rng, params = np.random.default_rng(2), random_params(config)
    for path in ("layers/mlp/gate", "layers/mlp/up", "layers/attention/value"):
        shape = params[path].shape
        flat = [rng.normal(size=(np.prod(shape[1:-1]), 4)) for _ in range(shape[0])]
        low = np.stack([f @ rng.normal(size=(4, shape[-1])) for f in flat]) / 8
        params = params | {path: low.reshape(shape).astype(np.float32)}
    layout = layout_of(config)
    # Of one token each, which attend to themselves alone.
    rows = batch(config)._replace(
        tokens=jnp.arange(6)[:, None], targets=jnp.zeros((6, 1), jnp.int32),
        segment_ids=jnp.ones((6, 1), jnp.int32), positions=jnp.zeros((6, 1), jnp.int32),
        loss_mask=jnp.ones((6, 1), bool),
    )  # fmt: skip
    return jax.jit(lambda p: observe_batch(layout, p, rows, kinds))(params)


def test_weights_of_low_rank_predict_outputs() -> None:
    assert RANK >= 4
    predicted, real = seen("predicted"), seen("outputs")
    assert predicted.outputs.keys() == real.outputs.keys() == {"query_head", "channel"}
    for unit, energy in real.outputs.items():
        assert_close(predicted.outputs[unit], energy, "float32", "forward")
