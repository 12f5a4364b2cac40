"""Factors of matrices of low rank, in a file beside the merged model."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from sat_jax.compress.layers import matrices
from sat_jax.errors import UserError
from sat_jax.interop import locate, open_weights
from sat_jax.interop.huggingface import Dtype, numpy_dtype
from sat_jax.interop.weights import cast
from sat_jax.models.build import layout_of
from sat_jax.nn.decoder import Compute, Decoder
from sat_jax.nn.layout import parameters
from sat_jax.nn.linear import Weight, dense
from sat_jax.nn.low_rank import LowRank

FACTORS_FILE = "factors.safetensors"
_NAMES = ("left", "right")
W = TypeVar("W", bound=Weight)


def stack_layers(layers: Sequence[Mapping[str, W]]) -> dict[str, W]:
    """Return the weights of all layers by path, stacked, such as `CompressedLayer.factors`."""
    return {
        path: jax.tree.map(lambda *arrays: np.stack(arrays), *(one[path] for one in layers))
        for path in layers[0]
    }


def factors_file(factors: Mapping[str, LowRank], dtype: Dtype) -> bytes:
    """Return the contents of `FACTORS_FILE`: for each path the tensors `path/left` and `path/right`
    of all layers. Raises `UserError` for values that the dtype does not have."""
    number = numpy_dtype(dtype)
    return save(
        {
            f"{path}/{name}": np.ascontiguousarray(cast(getattr(weight, name), number, path))
            for path, weight in factors.items()
            for name in _NAMES
        }
    )


def load_factored(
    directory: str | Path, dtype: Literal["float32", "bfloat16"] = "float32"
) -> Decoder:
    """Return the model in a directory that `scripts.compress` wrote, with its matrices of low rank
    as `LowRank` weights: float32 parameters, computing in `dtype`.

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
    factors = _read_factors(file)
    shapes = {matrix.path: layout.shapes[matrix.path].shape for matrix in matrices(layout)}
    for path, weight in factors.items():
        if path not in shapes or not _have_product(weight, shapes[path]):
            raise UserError(f"{file}: {path} is no matrix of the model in {directory}")
    return layout.bind(
        {path: factors.get(path) or jnp.asarray(weights.read(path)) for path in layout.leaves}
    )


def merge_factors(model: Decoder) -> Decoder:
    """Return the model whose weights are all plain arrays, for `save_model`: products of factors,
    adapters added to their bases, and dequantized weights."""
    values = {path: dense(weight) for path, weight in parameters(model).items()}
    return layout_of(model.config, model.compute).bind(values)


def _have_product(weight: LowRank, shape: tuple[int, ...]) -> bool:
    """Return whether the factors are those of matrices of this shape, `[L, *units, D]`."""
    left, right = weight.left.shape, weight.right.shape
    return left[:-1] == shape[:-1] and right == (shape[0], left[-1], shape[-1])


def _read_factors(file: Path) -> dict[str, LowRank]:
    try:
        tensors = load_file(file)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file}: cannot be read as safetensors: {error}") from error
    factors = {}
    for path in {name.rpartition("/")[0] for name in tensors}:
        try:
            left, right = (jnp.float32(tensors[f"{path}/{name}"]) for name in _NAMES)
        except KeyError as error:
            raise UserError(f"{file}: no tensor {error}") from error
        factors[path] = LowRank(left, right)
    return factors
