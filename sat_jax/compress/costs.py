"""Size and FLOPs of a model with weights that are 0."""

import math
from collections.abc import Mapping
from typing import Any

from sat_jax.nn.layout import Layout
from sat_jax.sparsity.flops import forward_flops


def costs(
    layout: Layout[Any], zeros: Mapping[str, int], row_length: int, itemsize: int
) -> dict[str, Any]:
    """Return the numbers of weights, bytes and FLOPs a token, before and after.

    `zeros` is the number of weights that are 0 of each matrix, in all layers. FLOPs are those of a
    forward pass with logits on rows of `row_length` tokens. Zeros are stored and multiplied like
    other weights, so that bytes and FLOPs stay the same; `without_zeros` is what would remain if
    products with them were left out.
    """
    total = sum(math.prod(shape.shape) for shape in layout.shapes.values())
    count = sum(zeros.values())
    matrices = sum(math.prod(layout.shapes[path].shape) for path in zeros)
    flops = forward_flops(layout, row_length).total
    return {
        "weights": {"all": total, "in_matrices": matrices, "zero": count},
        "bytes": {"before": total * itemsize, "after": total * itemsize},
        "flops_per_token": {
            "before": flops,
            "after": flops,
            "without_zeros": flops - 2 * count,
        },
    }
