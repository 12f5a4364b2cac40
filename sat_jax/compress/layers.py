"""Compression of a model layer by layer, with statistics of calibration text.

The statistics of a layer are of the outputs of the layers before it, which are compressed already.
Beside the weights of the model there are one layer, its statistics, and three residual streams of
all calibration tokens: before the layer, and after it with and without compression.
"""

import functools
import math
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from sat_jax.compress.input_statistics import InputStatistics, Needs
from sat_jax.compress.method import (
    ByMatrix,
    Compressed,
    Factors,
    MatrixMethod,
    QuantizedMatrix,
    method_of,
)
from sat_jax.errors import UserError
from sat_jax.nn.context import Observable, Observed
from sat_jax.nn.decoder import Decoder
from sat_jax.nn.layout import Layout
from sat_jax.nn.linear import Weight
from sat_jax.nn.low_rank import LowRank
from sat_jax.nn.quantized import NORMAL_FLOAT, Quantized, pack

_W = TypeVar("_W", bound=Weight)

Matrix2D = Float[Array, "out in"]
# What branches report of the inputs of matrices that read the residual stream, and of those that
# write to it.
_OBSERVED: dict[Needs, tuple[Observable, ...]] = {
    "nothing": (),
    "squares": ("inputs", "activations"),
    "magnitudes": ("input_magnitudes", "magnitudes"),
    "gram": ("input_products", "products"),
}
_STATISTICS: dict[Needs, Callable[[int, Any], InputStatistics]] = {
    "squares": lambda tokens, sums: InputStatistics(tokens, sums.square),
    "magnitudes": lambda tokens, sums: InputStatistics(
        tokens, sums.square, magnitudes=sums.absolute
    ),
    "gram": InputStatistics.of_gram,
}
NOTHING = InputStatistics(0, np.zeros(0))


class Rows(Protocol):
    """Rows of calibration tokens, such as `data.batch.Batch`; segment 0 is padding."""

    @property
    def tokens(self) -> Int[Any, "B T"]: ...
    @property
    def segment_ids(self) -> Int[Any, "B T"]: ...
    @property
    def positions(self) -> Int[Any, "B T"]: ...


class Matrix(NamedTuple):
    """A matrix that each layer has: `shape` in one layer, the innermost `unit` of its branch, and
    whether it `writes` to the residual stream or reads it."""

    path: str
    shape: tuple[int, ...]
    unit: str
    writes: bool

    @property
    def columns(self) -> int:
        """Number of inputs."""
        return math.prod(self.shape[:-1]) if self.writes else self.shape[-1]

    @property
    def rows(self) -> int:
        """Number of outputs."""
        return math.prod(self.shape) // self.columns

    def flatten(self, weight: Array) -> Matrix2D:
        """Return the weights of one layer as `[out, in]`."""
        rows = weight.reshape(-1, self.shape[-1])
        return rows.T if self.writes else rows

    def unflatten(self, matrix: Matrix2D) -> Array:
        """Return the inverse of `flatten`."""
        return (matrix.T if self.writes else matrix).reshape(self.shape)

    def low_rank(self, factors: Factors) -> LowRank:
        """Return the weight of one layer with these factors."""
        left, right = factors
        if self.writes:
            left, right = right.T, left.T
        return LowRank(left.reshape(*self.shape[:-1], -1), right)

    def quantized(self, matrix: QuantizedMatrix) -> Quantized:
        """Return the weight of one layer with these integers, on the host."""
        array, input_scale = jax.tree.map(np.asarray, matrix)
        values: Any = self.unflatten(array.qvalue)
        scale = array.scale
        if self.writes:
            scale = scale.T
        else:
            scale = scale.reshape(*self.shape[:-1], -1)
        if input_scale is not None:
            input_scale = input_scale.reshape(self.shape[:-1] if self.writes else -1)
        values = values if values.dtype == jnp.int8 else pack(values)
        return Quantized(values, scale, input_scale, self.writes, array.qtype == NORMAL_FLOAT)


class CompressedLayer(NamedTuple):
    """Result of a layer. `removed`: the number of weights that are removed, by path. `error`: the
    norm of the change of the layer's output by the compression of the layer, relative to the norm
    of what the layer adds to the residual stream. `factors` of the matrices of low rank, and the
    `quantized` matrices, by path, on the host."""

    layer: int
    removed: dict[str, int]
    error: float
    factors: dict[str, LowRank]
    quantized: dict[str, Quantized]


class LayerStore(Protocol):
    """Layers that were compressed before, each with the new weights of its matrices by path
    (`saved_layers`)."""

    def read(self, layer: int) -> tuple[CompressedLayer, dict[str, np.ndarray]] | None:
        """Return a layer, or None if it has to be compressed."""

    def write(self, layer: CompressedLayer, weights: Mapping[str, np.ndarray]) -> None:
        """Save a layer."""


def matrices(layout: Layout[Any]) -> list[Matrix]:
    """Return the matrices of each layer: all products of the branches with weights."""
    result = []
    for path, leaf in layout.with_role("read", "write"):
        branch = layout.branches[path.split("/")[1]]
        shape = layout.shapes[path].shape[1:]
        result.append(Matrix(path, shape, branch.units[-1], leaf.role == "write"))
    return result


def check_matrices(layout: Layout[Any], method: MatrixMethod | ByMatrix) -> None:
    """Raise `UserError` if the method cannot compress some matrix."""
    for matrix in matrices(layout):
        for layer in range(layout.layers):
            if (one := method_of(method, matrix.path, layer)) is not None:
                one.check(matrix.rows, matrix.columns, matrix.path)


def compress_layers(
    layout: Layout[Decoder],
    values: MutableMapping[str, np.ndarray],
    batches: Sequence[Rows],
    method: MatrixMethod | ByMatrix,
    saved: LayerStore | None = None,
) -> Iterator[CompressedLayer]:
    """Compress the matrices of all layers, one layer at each iteration.

    `values` are the model's parameters by path, layers stacked; those of a layer are overwritten
    when it is compressed. `batches` are calibration rows of equal shape. `method` is one for all
    matrices, or one for each. Layers that are in `saved` are taken from there, the others are added
    to it. Raises `UserError`, before anything is
    changed, if the method cannot compress some matrix, and for activations that are not finite.
    """
    check_matrices(layout, method)
    streams = embed_rows(layout, values, batches)
    for layer in range(layout.layers):
        weights = layer_weights(layout, values, layer)
        known = saved.read(layer) if saved else None
        if known is None:
            outputs, statistics = run_layer(layout, values, weights, batches, streams, method.needs)
            result, new = _compress_layer(layout, layer, weights, statistics, method)
        else:
            result, new = known
        for path, weight in new.items():
            weights[path] = jnp.asarray(weight)[None]
            values[path][layer] = weight
        compressed, _ = run_layer(layout, values, weights, batches, streams, "nothing")
        if known is None:
            result = result._replace(error=_error(batches, streams, outputs, compressed))
            if saved:
                saved.write(result, new)
        streams = compressed
        yield result


def _compress_layer(
    layout: Layout[Decoder],
    layer: int,
    weights: Mapping[str, Array],
    statistics: Mapping[tuple[str, bool], InputStatistics],
    method: MatrixMethod | ByMatrix,
) -> tuple[CompressedLayer, dict[str, np.ndarray]]:
    """Return a layer without its error, and the new weights of its matrices on the host."""
    result, new = CompressedLayer(layer, {}, math.nan, {}, {}), {}
    for matrix in matrices(layout):
        sums = statistics.get((matrix.unit, matrix.writes), NOTHING)
        weight = matrix.flatten(weights[matrix.path][0])
        _check_finite(layer, matrix.path, weight, sums)
        one = method_of(method, matrix.path, layer)
        compressed = Compressed(weight, 0) if one is None else one(weight, sums)
        result.removed[matrix.path] = compressed.removed
        if compressed.factors is not None:
            factors = matrix.low_rank(compressed.factors)
            result.factors[matrix.path] = jax.tree.map(np.asarray, factors)
        if compressed.quantized is not None:
            result.quantized[matrix.path] = matrix.quantized(compressed.quantized)
        new[matrix.path] = np.asarray(matrix.unflatten(compressed.weight))
    return result, new


def _error(
    batches: Sequence[Rows],
    streams: Sequence[Array],
    outputs: Sequence[Array],
    compressed: Sequence[Array],
) -> float:
    """Return `CompressedLayer.error`, from the residual streams of each batch before the layer, and
    after it without and with compression."""
    changes = [
        _squares(batch.segment_ids, *residuals)
        for batch, *residuals in zip(batches, streams, outputs, compressed, strict=True)
    ]
    change, added = np.sum(np.asarray(changes, np.float64), axis=0)
    return float(np.sqrt(change / added))


def _check_finite(layer: int, path: str, weight: Matrix2D, statistics: InputStatistics) -> None:
    if not np.isfinite(statistics.squares).all():
        raise UserError(
            f"layer {layer}: the inputs of {path} are not finite; accepted: a model whose"
            " activations are finite on the calibration text"
        )
    if not jnp.isfinite(weight).all():
        raise UserError(
            f"layer {layer}: {path} has weights that are not finite; accepted: finite numbers"
        )


def layer_weights(
    layout: Layout[Any], values: Mapping[str, np.ndarray], layer: int
) -> dict[str, Array]:
    """Return a copy of the arrays of one layer, `[1, ...]`."""
    return {
        path: jnp.array(values[path][layer : layer + 1])  # a copy: `values` may change
        for path, leaf in layout.leaves.items()
        if leaf.in_layers
    }


def embed_rows(
    layout: Layout[Decoder], values: Mapping[str, np.ndarray], batches: Sequence[Rows]
) -> list[Array]:
    """Return the residual stream before the first layer, of each batch."""
    outside = {p: None if leaf.in_layers else values[p] for p, leaf in layout.leaves.items()}
    model = layout.bind(jax.tree.map(jnp.asarray, outside))
    return [
        model.embed_tokens(jnp.asarray(rows.tokens), jnp.asarray(rows.positions)).astype(
            model.compute.dtype
        )
        for rows in batches
    ]


def run_layer(
    layout: Layout[Decoder],
    values: Mapping[str, np.ndarray],
    weights: Mapping[str, Array],
    batches: Sequence[Rows],
    streams: Sequence[Array],
    needs: Needs,
) -> tuple[list[Array], dict[tuple[str, bool], InputStatistics]]:
    """Return the residual stream of each batch after the layer with these `weights`, and the
    statistics of the inputs of matrices, by the unit of their branch and whether they write."""
    graph, state = split_layer(layout, values, weights)
    outputs: list[Array] = []
    statistics: dict[tuple[str, bool], InputStatistics] = {}
    kinds = _OBSERVED[needs]
    for rows, stream in zip(batches, streams, strict=True):
        output, observed = apply_layer(
            graph, state, stream, rows.segment_ids, rows.positions, kinds
        )
        tokens = int(np.sum(np.asarray(rows.segment_ids) > 0))
        for writes, kind in enumerate(kinds):
            for unit, sums in observed[kind].items():
                of_layer = jax.tree.map(lambda array: np.asarray(array[0], np.float64), sums)
                part = _STATISTICS[needs](tokens, of_layer)
                key = unit, bool(writes)
                statistics[key] = statistics[key] + part if key in statistics else part
        outputs.append(output)
    return outputs, statistics


def split_layer(
    layout: Layout[Decoder], values: Mapping[str, np.ndarray], weights: Mapping[str, Array]
) -> tuple[nnx.GraphDef[Decoder], nnx.State]:
    """Return the model that has one layer, with these `weights`, and no embedding."""
    # Layers read no trained array outside of them.
    outside = {p: None if leaf.trained else values[p] for p, leaf in layout.leaves.items()}
    graph, state = nnx.split(layout.bind({**outside, **weights}))
    return graph, state


@functools.partial(jax.jit, static_argnames=("graph", "observe"))
def apply_layer(
    graph: nnx.GraphDef[Decoder],
    state: nnx.State,
    stream: Float[Array, "B T D"],
    segment_ids: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    observe: tuple[Observable, ...],
) -> tuple[Float[Array, "B T D"], Observed]:
    """Return the residual stream after one layer, and what its branches observed."""
    model: Decoder = nnx.merge(graph, state)
    output, (observed,) = model.apply_layers(stream, segment_ids, positions, observe=observe)
    return output, observed


@jax.jit
def _squares(
    segment_ids: Int[Array, "B T"],
    stream: Float[Array, "B T D"],
    output: Float[Array, "B T D"],
    compressed: Float[Array, "B T D"],
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Return the sums of squares, over tokens, of the change of the output by the compression, and
    of what the layer adds to the residual stream."""
    mask = (segment_ids > 0)[..., None]
    x, y, z = (a.astype(jnp.float32) for a in (stream, output, compressed))
    return jnp.sum(jnp.square(z - y) * mask), jnp.sum(jnp.square(y - x) * mask)


def stack_layers(layers: Sequence[Mapping[str, _W]]) -> dict[str, _W]:
    """Return the weights of all layers by path, stacked, such as `CompressedLayer.factors`."""
    return {
        path: jax.tree.map(lambda *arrays: np.stack(arrays), *(one[path] for one in layers))
        for path in layers[0]
    }


def with_equal_bits(layers: Sequence[dict[str, Quantized]]) -> list[dict[str, Quantized]]:
    """Return the weights of all layers, those of 4 bits stored in 8 where another layer has 8, so
    that they can be stacked."""
    wide = {path for layer in layers for path, weight in layer.items() if weight.bits == 8}
    return [
        {path: weight.widened() if path in wide else weight for path, weight in layer.items()}
        for layer in layers
    ]
