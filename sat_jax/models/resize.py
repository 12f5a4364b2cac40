"""Configs of models that have other sizes of named axes."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from sat_jax.errors import UserError
from sat_jax.models.build import layout_of
from sat_jax.models.decoder_config import DecoderConfig

# Fields of configs, each the product of axes: of those that a model has.
_FIELDS = {
    "n_layers": ("layer",),
    "d_model": ("embed",),
    "d_ff": ("channel",),
    "n_heads": ("head", "kv_group", "query_head"),
    "n_kv_heads": ("kv_group",),
    "d_value": ("head", "value_dim"),
}


def axis_sizes(config: DecoderConfig) -> dict[str, int]:
    """Return the size of every named axis of a model."""
    layout = layout_of(config)
    return {
        axis: size
        for path, leaf in layout.leaves.items()
        for axis, size in zip(leaf.axes, layout.shapes[path].shape, strict=True)
    }


def resized(config: DecoderConfig, sizes: Mapping[str, int]) -> DecoderConfig:
    """Return the config of the model whose axes have these `sizes`, and all others their size.

    Raises `UserError` where no config of the family has such a model, for example where the size of
    a head follows from other fields.
    """
    asked = {**axis_sizes(config), **sizes}
    names = {field.name for field in dataclasses.fields(config)}
    fields: dict[str, Any] = {
        name: math.prod(asked[axis] for axis in axes if axis in asked)
        for name, axes in _FIELDS.items()
        if name in names
    }
    changed = {name: n for name, n in fields.items() if n != getattr(config, name)}
    smaller = dataclasses.replace(config, **changed)
    for axis, size in reversed(axis_sizes(smaller).items()):  # those of layers first
        expected = asked["embed" if axis == "norm" else axis]
        if size != expected:
            text = ", ".join(f"{name} {getattr(smaller, name)}" for name in fields)
            raise UserError(
                f"{config.family}: {axis} would be {size} with {text}, and the weights have"
                f" {expected}; its config has no field for {axis}; accepted: sizes from which"
                f" {axis} {expected} follows"
            )
    return smaller
