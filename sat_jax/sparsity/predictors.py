"""Low-rank approximations of frozen matrices, computed once, that predict activations.

They are constants of the branches beside their matrices: `layers/mlp/predictors/gate/left`
`[L, F, r]` and `…/right` `[L, r, D]` approximate the pretrained `layers/mlp/gate`. Everything that
reads a layout (sharding, checkpoints, segments) applies to them.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
from jaxtyping import Array

from sat_jax.nn.branch import branches
from sat_jax.nn.decoder import Decoder
from sat_jax.nn.layout import Flat, Layout, make_layout
from sat_jax.nn.low_rank import LowRank, approximation
from sat_jax.nn.param import Constant


@functools.cache
def predictor_layout(layout: Layout[Decoder], rank: int) -> Layout[Decoder]:
    """Return the layout with predictors of all matrices that read the residual stream."""
    model = layout.bind(layout.shapes)
    parts = branches(model.layers)
    for (name, matrix), (path, axes) in _matrices(layout).items():
        shape = jax.eval_shape(lambda w: _approximations(w, rank), layout.shapes[path])
        parts[name].predictors[matrix] = Constant(shape, axes=axes, role="vector")
    extended = make_layout(model)
    # What is trained of the others is not in the model.
    return dataclasses.replace(extended, leaves={**extended.leaves, **layout.leaves})


def add_predictors(layout: Layout[Decoder], values: Mapping[str, Array], rank: int) -> Flat:
    """Return the arrays of a model with predictors by path. `layout` and `values` are those of the
    model without them."""
    predictors: Flat = {}
    for (name, matrix), (path, _) in _matrices(layout).items():
        factors = _approximations(values[path], rank)
        place = f"layers/{name}/predictors/{matrix}"
        predictors |= {f"{place}/left": factors.left, f"{place}/right": factors.right}
    return {**values, **predictors}


def _approximations(weight: Array, rank: int) -> LowRank:
    """Return those of all layers, one layer at a time."""
    factors: LowRank = jax.lax.map(lambda w: approximation(w, rank), weight)
    return factors


def _matrices(layout: Layout[Any]) -> dict[tuple[str, str], tuple[str, tuple[str, ...]]]:
    """Return path and axes of each matrix that reads the residual stream, by branch and name: the
    frozen one where it has an adapter."""
    matrices = {}
    for path, leaf in layout.with_role("read"):
        _, branch, matrix, *inside = path.split("/")
        if inside in ([], ["base"]):
            matrices[branch, matrix] = path, leaf.axes
    return matrices
