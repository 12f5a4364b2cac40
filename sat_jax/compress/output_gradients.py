"""Second moments of the gradients of the loss with respect to the outputs of matrices."""

import dataclasses
import functools
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from sat_jax.compress.layers import matrices
from sat_jax.models.build import layout_of
from sat_jax.models.decoder_config import DecoderConfig
from sat_jax.nn.decoder import Compute, Decoder
from sat_jax.nn.layout import Layout
from sat_jax.nn.linear import Weight, combine, project
from sat_jax.nn.loss import next_token_loss


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=("values", "squares"), meta_fields=()
)
@dataclasses.dataclass(frozen=True)
class _Observed(Weight):
    """An array whose products pass on, as the gradient of `squares`, the sums over tokens of the
    squared gradients of its outputs: `[*L, *units]`, or `[*L, D]` where it writes."""

    values: Float[Array, "*axes"]
    squares: Float[Array, "*outputs"]

    def dense(self) -> Array:
        return self.values

    def project(self, x: Float[Array, "B T D"]) -> Array:
        return _with_squares(project(self.values, x), self.squares)

    def combine(self, a: Array) -> Float[Array, "B T D"]:
        return _with_squares(combine(self.values, a), self.squares)


@jax.custom_vjp
def _with_squares(y: Array, squares: Array) -> Array:
    """Return y."""
    del squares
    return y


def _forward(y: Array, squares: Array) -> tuple[Array, None]:
    return _with_squares(y, squares), None


def _backward(_: None, dy: Array) -> tuple[Array, Array]:
    return dy, jnp.sum(jnp.square(dy.astype(jnp.float32)), axis=(0, 1))


_with_squares.defvjp(_forward, _backward)


def output_gradients(
    config: DecoderConfig, values: Mapping[str, np.ndarray], batches: Iterable[Any]
) -> dict[str, Float[np.ndarray, "L out"]]:
    """Return by path of each matrix, for its outputs, the sums over all tokens of the squared
    gradients of the summed loss.

    `batches` have the fields of `data.batch.Batch`. The whole model is on the device; layers are
    computed again in the backward pass, which saves memory.
    """
    layout = layout_of(config, Compute(remat="full"))
    params = {path: jnp.asarray(value) for path, value in values.items()}
    totals: dict[str, Any] = {}
    for batch in batches:
        for path, sums in _batch_gradients(layout, params, batch).items():
            totals[path] = totals.get(path, 0) + np.asarray(sums, np.float64)
    return {path: total.reshape(layout.layers, -1) for path, total in totals.items()}


@functools.partial(jax.jit, static_argnames="layout")
def _batch_gradients(
    layout: Layout[Decoder], params: Mapping[str, Array], batch: Any
) -> dict[str, Array]:
    def loss(squares: dict[str, Array]) -> Array:
        observed = {path: _Observed(params[path], array) for path, array in squares.items()}
        total, _ = next_token_loss(layout.bind({**params, **observed}), *batch)
        return total

    zeros = {
        matrix.path: jnp.zeros(
            (layout.layers, *(matrix.shape[-1:] if matrix.writes else matrix.shape[:-1]))
        )
        for matrix in matrices(layout)
    }
    return jax.grad(loss)(zeros)
