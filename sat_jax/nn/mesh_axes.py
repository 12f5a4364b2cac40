"""Mesh axes over which arrays are split by hand, where the compiler cannot split an operation."""

import math

import jax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

PIPELINE, TENSOR, CONTEXT = "pipeline", "tensor", "context"
ROW_AXES, GROUP_AXES = (PIPELINE, "data", "fsdp"), (TENSOR,)


def parts(*axes: str) -> int:
    """Return the number of parts in which these mesh axes split an array; 1 without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    sizes = dict(zip(mesh.axis_names, mesh.axis_sizes, strict=True))
    return math.prod(sizes.get(axis, 1) for axis in axes)


def full_rows(table: Float[Array, "N D"]) -> Float[Array, "N D"]:
    """Return a table whose rows are not split, for tokens that are split over the same devices:
    otherwise the compiler gathers vectors of all tokens, of which there may be many more."""
    if parts("fsdp", CONTEXT) == 1:
        return table
    return jax.lax.with_sharding_constraint(table, P(P.UNCONSTRAINED, None))
