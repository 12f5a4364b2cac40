"""Models whose matrices have low-rank adapters (`nn.lora`).

A model with adapters has a layout of its own: the matrix `layers/mlp/up` becomes the arrays
`layers/mlp/up/base`, which is frozen, and `layers/mlp/up/update/left` and `…/right`, which are
trained. Everything that reads a layout (sharding, optimizer, FLOPs, checkpoints) applies to it
unchanged.

The bases may be quantized (QLoRA, arXiv:2305.14314), `layers/mlp/up/base/values` and `…/scale`, and
so are then the matrices without adapters, `layers/mlp/up/values` and `…/scale`.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from sat_jax.errors import UserError
from sat_jax.models.build import layout_of
from sat_jax.nn.decoder import Decoder
from sat_jax.nn.layout import (
    Flat,
    Layout,
    Leaf,
    flat_values,
    make_layout,
    parameters,
    weight_reader,
)
from sat_jax.nn.linear import dense
from sat_jax.nn.lora import Lora, LoraSettings, new_lora
from sat_jax.nn.quantized import Packing

_ADAPTERS = 2  # the purpose of a random key: what it is folded with after the seed


def target_paths(layout: Layout[Any], targets: tuple[str, ...]) -> list[str]:
    """Return the paths of the matrices of layers with these names, or of all for no name.

    A name is the end of a path ("up", "mlp/up"). Raises `UserError` for one that no matrix has.
    """
    paths = [path for path, _ in layout.with_role("read", "write")]
    names = dict.fromkeys(path.rpartition("/")[2] for path in paths)
    for target in targets:
        if not any(_is_named(path, target) for path in paths):
            raise UserError(
                f"lora.targets: this model has no matrix {target!r}; accepted: {', '.join(names)},"
                " also with the name of the branch, as in mlp/up"
            )
    return [path for path in paths if not targets or any(_is_named(path, t) for t in targets)]


def _is_named(path: str, target: str) -> bool:
    return f"/{path}".endswith(f"/{target}")


@functools.cache
def lora_layout(
    layout: Layout[Decoder], settings: LoraSettings, packing: Packing | None = None
) -> Layout[Decoder]:
    """Return the layout of the model with adapters, whose other parameters are frozen but those
    that the settings name. `packing`: how the matrices of layers are quantized; None: they are
    not."""
    base = _base_shapes(layout, packing)
    values = jax.eval_shape(lambda v: _with_adapters(layout, v, settings, 0), base)
    adapted = make_layout(layout.bind(values))
    leaves = {path: _leaf(layout, path, leaf, settings) for path, leaf in adapted.leaves.items()}
    return dataclasses.replace(adapted, leaves=leaves)


@functools.cache
def base_layout(layout: Layout[Decoder], packing: Packing | None) -> Layout[Decoder]:
    """Return the layout of the model without adapters, whose matrices of layers are quantized."""
    return layout if packing is None else make_layout(layout.bind(_base_shapes(layout, packing)))


def _base_shapes(layout: Layout[Decoder], packing: Packing | None) -> Flat:
    """Return abstract parameters by path, of which matrices of layers are quantized."""
    base: Flat = dict(layout.shapes)
    if packing is not None:
        for path, leaf in layout.with_role("read", "write"):
            base[path] = packing.abstract(layout.shapes[path].shape, leaf.role == "write")
    return base


def _leaf(layout: Layout[Any], path: str, leaf: Leaf, settings: LoraSettings) -> Leaf:
    if path not in layout.leaves:
        return leaf
    is_norm = leaf.role == "vector" and "norm" in path.rpartition("/")[2]
    kind = "norms" if is_norm else "embeddings" if leaf.role == "embedding" else None
    return leaf._replace(trained=leaf.trained and kind in settings.trained)


def add_lora(layout: Layout[Any], values: Flat, settings: LoraSettings, seed: int) -> Flat:
    """Return the arrays of a model with new adapters, which do not change its function, by path.
    `layout` and `values`, arrays and quantized weights, are those of the model without them."""
    return flat_values(layout.bind(_with_adapters(layout, values, settings, seed)))


def _with_adapters(layout: Layout[Any], values: Flat, settings: LoraSettings, seed: int) -> Flat:
    key = jax.random.fold_in(jax.random.key(seed), _ADAPTERS)
    adapted = dict(values)
    for number, path in enumerate(target_paths(layout, settings.targets)):
        writes = layout.leaves[path].role == "write"
        adapted[path] = new_lora(values[path], settings, writes, jax.random.fold_in(key, number))
    return adapted


def base_reader(
    read: Callable[[str], np.ndarray], layout: Layout[Decoder]
) -> Callable[[str], np.ndarray]:
    """Return a function that returns the parameters of the model without adapters by path;
    arguments as those of `nn.layout.merged_reader`."""
    weight = weight_reader(read, layout)

    def base(path: str) -> np.ndarray:
        found = weight(path)
        return np.asarray(dense(found.base if isinstance(found, Lora) else found))

    return base


def adapters_of(model: Decoder) -> dict[str, Lora]:
    """Return the adapted weights of a model by path."""
    return {path: weight for path, weight in parameters(model).items() if isinstance(weight, Lora)}


def with_new_adapters(model: Decoder, settings: LoraSettings, seed: int = 0) -> Decoder:
    """Return the model with new adapters, whose bases may be quantized. Raises `UserError` if it
    has some already, and for targets that it does not have."""
    check_plain(model)
    layout = layout_of(model.config, model.compute)
    return layout.bind(_with_adapters(layout, parameters(model), settings, seed))


def without_adapters(model: Decoder) -> Decoder:
    """Return the model with the bases of its adapted weights, bit for bit. Parameters that were
    trained in full stay as they are."""
    values: Mapping[str, Any] = {
        path: weight.base if isinstance(weight, Lora) else weight
        for path, weight in parameters(model).items()
    }
    return layout_of(model.config, model.compute).bind(values)


def check_plain(model: Decoder) -> None:
    """Raise `UserError` if the model has adapters."""
    if adapters_of(model):
        raise UserError(
            "the model has adapters already; accepted: one without, as merge_factors and"
            " without_adapters return"
        )
