"""Factors of matrices of low rank, in a file beside the merged model."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from sat_jax.compress.layers import matrices, stack_layers
from sat_jax.errors import UserError
from sat_jax.interop import locate, open_weights
from sat_jax.interop.huggingface import Dtype, numpy_dtype
from sat_jax.interop.weights import cast
from sat_jax.models.build import layout_of
from sat_jax.nn.decoder import Compute, Decoder
from sat_jax.nn.layout import parameters
from sat_jax.nn.linear import dense
from sat_jax.nn.low_rank import LowRank

FACTORS_FILE = "factors.safetensors"
_NAMES = ("left", "right")


def factors_file(layers: Sequence[Mapping[str, LowRank]], dtype: Dtype) -> bytes:
    """Return the contents of `FACTORS_FILE`: for each layer and path that has factors, the tensors
    `path/layer/left` and `path/layer/right`. Raises `UserError` for values that the dtype does not
    have."""
    number = numpy_dtype(dtype)
    return save(
        {
            f"{path}/{layer}/{name}": np.ascontiguousarray(
                cast(getattr(weight, name), number, path)
            )
            for layer, factors in enumerate(layers)
            for path, weight in factors.items()
            for name in _NAMES
        }
    )


def load_factored(
    directory: str | Path, dtype: Literal["float32", "bfloat16"] = "float32"
) -> Decoder:
    """Return the model in a directory that `scripts.compress` wrote, with its matrices of low rank
    as `LowRank` weights: float32 parameters, computing in `dtype`.

    Where ranks differ between layers, each layer is a segment of the model of its own: it compiles
    more slowly, and does not decode.
    Raises `UserError` for a directory without factors, or with those of another model.
    """
    file = locate(directory) / FACTORS_FILE
    if not file.is_file():
        raise UserError(
            f"{file}: no such file; accepted: a directory that scripts.compress wrote with a"
            " low-rank method"
        )
    weights = open_weights(directory)
    layout = layout_of(weights.config, Compute(dtype=dtype))
    factors, parts = _read_factors(file), {m.path: m.shape for m in matrices(layout)}
    for path, layers in factors.items():
        for layer, weight in layers.items():
            if path not in parts or layer >= layout.layers or not _fit(weight, parts[path]):
                raise UserError(
                    f"{file}: {path} of layer {layer} is no matrix of the model in {directory}"
                )
    values = {path: weights.read(path) for path in layout.leaves}
    if all(_is_uniform(layers, layout.layers) for layers in factors.values()):
        stacked = stack_layers(
            [{path: layers[n] for path, layers in factors.items()} for n in range(layout.layers)]
        )
        return layout.bind(
            {p: jax.tree.map(jnp.asarray, stacked.get(p, v)) for p, v in values.items()}
        )

    def by_layer(path: str, layer: int) -> Any:
        weight = factors.get(path, {}).get(layer)
        if weight is None:
            return jnp.asarray(values[path][layer : layer + 1])
        return jax.tree.map(lambda array: jnp.asarray(array)[None], weight)

    return layout.bind(
        {
            path: tuple(by_layer(path, layer) for layer in range(layout.layers))
            if leaf.in_layers
            else jnp.asarray(values[path])
            for path, leaf in layout.leaves.items()
        }
    )


def _is_uniform(layers: Mapping[int, LowRank], count: int) -> bool:
    """Return whether all layers have factors, of one rank."""
    return len(layers) == count and len({weight.rank for weight in layers.values()}) == 1


def merge_factors(model: Decoder) -> Decoder:
    """Return the model whose weights are all plain arrays, for `save_model`: products of factors,
    adapters added to their bases, and dequantized weights."""
    values = {path: _merged(weight) for path, weight in parameters(model).items()}
    return layout_of(model.config, model.compute).bind(values)


def _merged(weight: Any) -> Any:
    """Return a weight as one array, of all segments."""
    if isinstance(weight, tuple):
        return jnp.concatenate([dense(part) for part in weight])
    return dense(weight)


def _fit(weight: LowRank, shape: tuple[int, ...]) -> bool:
    """Return whether the factors are those of a matrix of this shape, `[*units, D]`."""
    left, right = weight.left.shape, weight.right.shape
    return left[:-1] == shape[:-1] and right == (left[-1], shape[-1])


def _read_factors(file: Path) -> dict[str, dict[int, LowRank]]:
    """Return the factors by path and layer."""
    try:
        tensors = load_file(file)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file}: cannot be read as safetensors: {error}") from error
    factors: dict[str, dict[int, LowRank]] = {}
    for place in {name.rpartition("/")[0] for name in tensors}:
        path, _, layer = place.rpartition("/")
        if not layer.isdecimal():
            raise UserError(f"{file}: {place} has no layer; accepted: what scripts.compress wrote")
        try:
            parts: list[Any] = [np.asarray(tensors[f"{place}/{n}"], np.float32) for n in _NAMES]
        except KeyError as error:
            raise UserError(f"{file}: no tensor {error}") from error
        factors.setdefault(path, {})[int(layer)] = LowRank(*parts)
    return factors
