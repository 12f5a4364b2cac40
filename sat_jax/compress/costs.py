"""Size and FLOPs of a model with fewer weights, or with quantized ones."""

import math
from collections.abc import Mapping
from typing import Any

from sat_jax.compress.layers import matrices
from sat_jax.compress.method import ByMatrix, MatrixMethod, Saving, method_of
from sat_jax.compress.quantize import Quantization
from sat_jax.nn.layout import Layout
from sat_jax.sparsity.flops import forward_flops


def costs(
    layout: Layout[Any],
    removed: Mapping[str, int],
    row_length: int,
    itemsize: int,
    saving: Saving,
) -> dict[str, Any]:
    """Return the numbers of weights, bytes and FLOPs a token, before and after.

    `removed` is the number of weights of each matrix, in all layers, that are 0 or that its factors
    save. FLOPs are those of a forward pass with logits on rows of `row_length` tokens. The written
    model has matrices of the same size, so that its bytes and FLOPs stay the same. `saving` names
    what they are without the removed weights; the places of zeros are not counted.
    """
    total = sum(math.prod(shape.shape) for shape in layout.shapes.values())
    count = sum(removed.values())
    matrices = sum(math.prod(layout.shapes[path].shape) for path in removed)
    flops = forward_flops(layout, row_length).total
    return {
        "weights": {"all": total, "in_matrices": matrices, "removed": count},
        "bytes": {
            "before": total * itemsize,
            "after": total * itemsize,
            saving: (total - count) * itemsize,
        },
        "flops_per_token": {"before": flops, "after": flops, saving: flops - 2 * count},
    }


def smaller_costs(
    before: Layout[Any], after: Layout[Any], row_length: int, itemsize: int
) -> dict[str, Any]:
    """Return the numbers of weights, bytes and FLOPs a token of a model and of a smaller one."""
    weights = [
        sum(math.prod(shape.shape) for shape in layout.shapes.values())
        for layout in (before, after)
    ]
    flops = [forward_flops(layout, row_length).total for layout in (before, after)]
    return {
        "weights": {"all": weights[0], "removed": weights[0] - weights[1]},
        "bytes": {"before": weights[0] * itemsize, "after": weights[1] * itemsize},
        "flops_per_token": {"before": flops[0], "after": flops[1]},
    }


def quantized_costs(
    layout: Layout[Any], method: MatrixMethod | ByMatrix, row_length: int, itemsize: int
) -> dict[str, Any]:
    """Return the numbers of weights, bytes, bits per weight, and FLOPs a token as `costs` does.

    `method` is a `Quantization`, or has one for each matrix. Bytes are those of all tensors. Other
    parameters than the matrices of layers have `itemsize` bytes, and before also these matrices. A
    weight is dequantized when it is used, which is not counted as FLOPs.
    """
    total = sum(math.prod(shape.shape) for shape in layout.shapes.values())
    parts = matrices(layout)
    count = layout.layers * sum(part.rows * part.columns for part in parts)
    size = 0
    for part in parts:
        for layer in range(layout.layers):
            one = method_of(method, part.path, layer)
            assert isinstance(one, Quantization)
            size += one.bytes(part.rows, part.columns)
    after = (total - count) * itemsize + size
    flops = forward_flops(layout, row_length).total
    return {
        "weights": {"all": total, "in_matrices": count},
        "bytes": {"before": total * itemsize, "after": after},
        "bits_per_weight": {"all": 8 * after / total, "in_matrices": 8 * size / count},
        "flops_per_token": {"before": flops, "after": flops},
    }
