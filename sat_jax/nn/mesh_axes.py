"""Mesh axes over which arrays are split by hand, where the compiler cannot split an operation."""

import math

import jax

PIPELINE, TENSOR, CONTEXT = "pipeline", "tensor", "context"
ROW_AXES, GROUP_AXES = (PIPELINE, "data", "fsdp"), (TENSOR,)


def parts(*axes: str) -> int:
    """Return the number of parts in which these mesh axes split an array; 1 without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    sizes = dict(zip(mesh.axis_names, mesh.axis_sizes, strict=True))
    return math.prod(sizes.get(axis, 1) for axis in axes)
