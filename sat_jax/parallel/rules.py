"""Where every array of a run lies on the mesh: one table, by the last part of a path."""

from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from sat_jax.errors import UserError
from sat_jax.models.layers import ROW_AXES

# Axes after the leading layer axis. Moments and update counts follow their parameter, cut to the
# axes they have.
_LAYER_AXES: dict[str, tuple[str | None, ...]] = {
    "query": ("tensor", None, None, "fsdp"),
    "output": ("tensor", None, None, "fsdp"),
    "output_offset": ("tensor", None, None, "fsdp"),
    "key": ("tensor", None, "fsdp"),
    "value": ("tensor", None, "fsdp"),
    "query_bias": ("tensor", None, None),
    "key_bias": ("tensor", None),
    "value_bias": ("tensor", None),
    "query_norm": (None,),
    "key_norm": (None,),
    "gate": ("tensor", "fsdp"),
    "up": ("tensor", "fsdp"),
    "down": ("tensor", "fsdp"),
    "down_offset": ("tensor", "fsdp"),
    "attention_norm": (None,),
    "mlp_norm": (None,),
}
_AXES: dict[str, tuple[str | None, ...]] = {
    "embed": ("tensor", "fsdp"),
    "lm_head": ("tensor", "fsdp"),
    "final_norm": (None,),
}
BATCH = P(ROW_AXES)


def parameter_spec(path: str, ndim: int) -> P:
    """Partition of the parameter at `path`, or of something of fewer axes that belongs to it."""
    leaf = path.rsplit("/", 1)[-1]
    axes = (None, *_LAYER_AXES[leaf]) if path.startswith("layers/") else _AXES[leaf]
    return P(*axes[:ndim])


def tree_shardings(mesh: Mesh, tree: Any) -> Any:
    """`NamedSharding`s in the shape of `tree`: by parameter path for whatever is keyed by one,
    replicated for all else (steps, masks, statistics)."""

    def sharding(keys: tuple[Any, ...], leaf: Any) -> NamedSharding:
        for key in reversed(keys):
            path = getattr(key, "key", None)
            if isinstance(path, str) and _known(path):
                return NamedSharding(mesh, parameter_spec(path, len(leaf.shape)))
        return NamedSharding(mesh, P())

    return jax.tree_util.tree_map_with_path(sharding, tree)


def check_divisible(mesh: Mesh, shapes: dict[str, jax.ShapeDtypeStruct]) -> None:
    """Raises `UserError` for the first parameter that the mesh cannot split evenly."""
    for path, shape in shapes.items():
        for size, axis in zip(shape.shape, parameter_spec(path, len(shape.shape)), strict=False):
            if axis is not None and size % mesh.shape[axis]:
                raise UserError(
                    f"mesh.{axis} = {mesh.shape[axis]} does not divide the {size} of {path}"
                    f" {shape.shape}"
                )


def _known(path: str) -> bool:
    leaf = path.rsplit("/", 1)[-1]
    return leaf in (_LAYER_AXES if path.startswith("layers/") else _AXES)
