"""How every array of a run is split over the mesh, by the named axes of the parameters."""

from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from sat_jax.errors import UserError
from sat_jax.nn.layout import Layout
from sat_jax.nn.mesh_axes import ROW_AXES

# Axes of parameters that are split, and the mesh axis that splits them; all others are replicated.
MESH_AXES = {"vocab": "tensor", "kv_group": "tensor", "channel": "tensor", "embed": "fsdp"}
BATCH = P(ROW_AXES)


def parameter_spec(layout: Layout[Any], path: str, ndim: int) -> P:
    """Return the partition of the parameter at `path`, or of something with its first `ndim` axes
    that belongs to it: a moment, an update count."""
    return P(*(MESH_AXES.get(axis) for axis in layout.leaves[path].axes[:ndim]))


def tree_shardings(mesh: Mesh, layout: Layout[Any], tree: Any) -> Any:
    """Return `NamedSharding`s in the shape of `tree`: by parameter path for whatever is keyed by
    one, replicated for all else (steps, kept indices, statistics)."""

    def sharding(keys: tuple[Any, ...], leaf: Any) -> NamedSharding:
        for key in reversed(keys):
            path = getattr(key, "key", None)
            if isinstance(path, str) and path in layout.leaves:
                return NamedSharding(mesh, parameter_spec(layout, path, len(leaf.shape)))
        return NamedSharding(mesh, P())

    return jax.tree_util.tree_map_with_path(sharding, tree)


def check_divisible(mesh: Mesh, layout: Layout[Any]) -> None:
    """Raises `UserError` for the first parameter that the mesh cannot split evenly."""
    for path, shape in layout.shapes.items():
        spec = parameter_spec(layout, path, len(shape.shape))
        for size, axis in zip(shape.shape, spec, strict=True):
            if axis is not None and size % mesh.shape[axis]:
                raise UserError(
                    f"mesh.{axis} = {mesh.shape[axis]} does not divide the {size} of {path}"
                    f" {shape.shape}"
                )
