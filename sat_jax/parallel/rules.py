"""Sharding of the arrays of a run over the mesh, by the named axes of the parameters."""

import math
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, Sharding
from jax.sharding import PartitionSpec as P

from sat_jax.errors import UserError
from sat_jax.nn.layout import Layout
from sat_jax.nn.mesh_axes import CONTEXT, PIPELINE, ROW_AXES, TENSOR
from sat_jax.nn.param import BLOCK_ROW, EMBED, EMBED_PAIR, LAYER

# Mesh axes of the split parameter axes; all other axes are replicated. Devices that share a row
# split the weights as those of `fsdp` do, or each would hold all of them.
MESH_AXES: dict[str, tuple[str, ...]] = {
    LAYER: (PIPELINE,),
    "vocab": (TENSOR,),
    "kv_group": (TENSOR,),
    "head": (TENSOR,),
    "channel": (TENSOR,),
    EMBED: ("fsdp", CONTEXT),
    EMBED_PAIR: ("fsdp", CONTEXT),
    BLOCK_ROW: (TENSOR,),
    "column_of_block": ("fsdp", CONTEXT),
}
BATCH = P(ROW_AXES, CONTEXT)


def parameter_spec(layout: Layout[Any], path: str, ndim: int) -> P:
    """Return the partition of the first `ndim` axes of the parameter at `path`, for the parameter,
    its moments and its update counts."""
    return P(*(MESH_AXES.get(axis) for axis in layout.leaves[path].axes[:ndim]))


def tree_shardings(mesh: Mesh, layout: Layout[Any], tree: Any) -> Any:
    """Return the `NamedSharding`s of `tree`: by parameter path for leaves whose path contains one,
    replicated for all others (steps, kept indices, statistics)."""

    def sharding(keys: tuple[Any, ...], leaf: Any) -> NamedSharding:
        for key in reversed(keys):
            path = getattr(key, "key", None)
            if isinstance(path, str) and path in layout.leaves:
                return NamedSharding(mesh, parameter_spec(layout, path, len(leaf.shape)))
        return NamedSharding(mesh, P())

    return jax.tree_util.tree_map_with_path(sharding, tree)


def place(value: np.ndarray, sharding: Sharding) -> jax.Array:
    """Return a value that every process has as an array over the devices of all processes."""
    return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])


def check_divisible(mesh: Mesh, layout: Layout[Any]) -> None:
    """Raise `UserError` for the first parameter that the mesh does not split evenly."""
    for path, shape in layout.shapes.items():
        for name, size in zip(layout.leaves[path].axes, shape.shape, strict=True):
            split = MESH_AXES.get(name, ())
            parts = math.prod(mesh.shape[axis] for axis in split)
            if size % parts:
                settings = " × ".join(f"mesh.{axis}" for axis in split if mesh.shape[axis] > 1)
                raise UserError(
                    f"{settings} = {parts} does not divide the {size} of axis {name} of {path}"
                    f" {shape.shape}"
                )
