"""Parameters with named axes: all that a model declares, and all that a method reads of it.

Axes are ordered `layer, *within, unit, ...`: `query` has `layer, kv_group, query_head, head_dim,
embed`. Some axes have a meaning of their own: `layer` is scanned over, and `channel` is the unit of
every MLP. In a block-sparse weight, `block` numbers the stored blocks of a `block_row`, and `index`
the entries of arrays that say where they are. An entry of `embed_pair` is a byte with two weights
of 4 bits, which are half of `embed` apart. Vectors that scale or shift the residual stream have
the axis `norm` in place of `embed`, so that they are not split over a mesh.
"""

from collections.abc import Callable, Mapping
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, ArrayLike

Role = Literal["read", "write", "embedding", "vector", "index"]
"""`read`: rows that read the residual stream; `write`: rows that write to it; `embedding`: a table
of tokens or positions; `vector`: norm scales and biases, which stay float32 until they are used and
have no weight decay; `index`: where the values of a sparse weight are."""

LAYER, CHANNEL, EMBED, NORM = "layer", "channel", "embed", "norm"
EMBED_PAIR = "embed_pair"
BLOCK_ROW, BLOCK, INDEX = "block_row", "block", "index"


class Control(nnx.Variable):
    """A variable of a branch that an execution sets between steps. It is not a parameter."""


class Mask(Control):
    """1 where a unit is kept and 0 where it is omitted, `[L, *within, unit]`; None: keep all."""


class Constant(nnx.Variable):
    """Numbers that are gathered with the units they belong to, and never trained."""


def param(
    values: Callable[[tuple[int, ...]], Array], axes: Mapping[str, int], role: Role = "read"
) -> nnx.Param:
    """Return a parameter whose axes have these names and sizes; `values` maps a shape to values."""
    return nnx.Param(values(tuple(axes.values())), axes=tuple(axes), role=role)


def constant(value: ArrayLike, axes: tuple[str, ...]) -> Constant:
    """Return a float32 constant whose axes have these names; like vectors, it is not cast."""
    return Constant(jnp.asarray(value, jnp.float32), axes=axes, role="vector")


def normal(rngs: nnx.Rngs, scale: float) -> Callable[[tuple[int, ...]], Array]:
    """Return an initializer with float32 values from N(0, scale²)."""
    return lambda shape: scale * jax.random.normal(rngs.params(), shape, jnp.float32)
