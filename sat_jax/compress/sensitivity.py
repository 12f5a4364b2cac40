"""The increase of the loss if one matrix of a model is compressed, for several settings.

Near a minimum, the change of the loss is that of a quadratic form of the change ΔW of the weights.
Its matrix is the Fisher information, which is approximated as in K-FAC (Martens and Grosse,
arXiv:1503.05671) by two factors: the second moments of the inputs x of the matrix and those of the
gradients of the loss with respect to its outputs y, of which the diagonal is used here. The
increase is then ½ Σ_o mean((∂L/∂y_o)²) · Σ (ΔW_o x)², with sums over outputs o and tokens.

This needs one forward and backward pass of the model for the gradients, one pass over the layers
for the inputs, and each matrix compressed once for each setting. Measuring the loss itself would
need a forward pass for each matrix and setting.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from sat_jax.compress.input_statistics import InputStatistics
from sat_jax.compress.layers import (
    embed_rows,
    layer_weights,
    matrices,
    run_layer,
)
from sat_jax.compress.method import MatrixMethod
from sat_jax.compress.output_gradients import output_gradients
from sat_jax.models.build import layout_of
from sat_jax.models.decoder_config import DecoderConfig

Track = Callable[[Iterable[Any]], Iterable[Any]]
Increases = Mapping[str, Float[np.ndarray, "L settings"]]
"""The increase of the loss in nats per token, by path of the matrix that is compressed alone."""


def loss_increases(
    config: DecoderConfig,
    values: Mapping[str, np.ndarray],
    batches: Sequence[Any],
    methods: Sequence[MatrixMethod],
    track: Track = iter,
) -> Increases:
    """Return the approximate increase of the loss for each matrix alone, compressed by each of the
    `methods`, which differ in one setting.

    `values` are the model's parameters by path, layers stacked, and are not changed. `batches` are
    calibration rows of equal shape, with the fields of `data.batch.Batch`.
    """
    layout = layout_of(config)
    gradients = output_gradients(config, values, batches)
    targets = sum(int(np.sum(batch.loss_mask)) for batch in batches)
    increases: dict[str, list[list[float]]] = {m.path: [] for m in matrices(layout)}
    streams = embed_rows(layout, values, batches)
    for layer in track(range(layout.layers)):
        weights = layer_weights(layout, values, layer)
        outputs, statistics = run_layer(layout, values, weights, batches, streams, "gram")
        if methods[0].needs == "magnitudes":
            _, magnitudes = run_layer(layout, values, weights, batches, streams, "magnitudes")
            statistics = {
                key: dataclasses.replace(sums, magnitudes=magnitudes[key].magnitudes)
                for key, sums in statistics.items()
            }
        streams = outputs
        for matrix in matrices(layout):
            weight = matrix.flatten(weights[matrix.path][0])
            sums = statistics[matrix.unit, matrix.writes]
            moments = gradients[matrix.path][layer] / sums.tokens
            increases[matrix.path].append(
                [_increase(method, weight, sums, moments) / targets for method in methods]
            )
    return {path: np.asarray(by_layer) for path, by_layer in increases.items()}


def _increase(
    method: MatrixMethod,
    weight: Float[Array, "out in"],
    statistics: InputStatistics,
    moments: Float[np.ndarray, " out"],
) -> float:
    compressed = method(weight, statistics).weight
    gram = jnp.asarray(statistics.gram, jnp.float32)
    return float(_quadratic(compressed - weight, gram, jnp.asarray(moments, jnp.float32)))


@jax.jit
def _quadratic(
    change: Float[Array, "out in"], gram: Float[Array, "in in"], moments: Float[Array, " out"]
) -> Float[Array, ""]:
    """Return ½ Σ_o moments_o · change_o · gram · change_oᵀ."""
    product = jnp.matmul(change, gram, precision=jax.lax.Precision.HIGHEST)
    return jnp.vdot(moments, jnp.sum(product * change, axis=1)) / 2
