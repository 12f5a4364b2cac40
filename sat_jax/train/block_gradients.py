"""Gradients of all blocks of block-sparse matrices, also of those that are not stored.

RigL (Evci et al., arXiv:1911.11134) grows blocks where the dense gradient is large. A dense matrix
and its gradient never exist for all layers: the backward pass of a layer reduces them to a number
for each block.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sat_jax.data.batch import Batch
from sat_jax.nn.block_sparse import BlockSparse
from sat_jax.nn.decoder import Decoder
from sat_jax.nn.layout import Layout
from sat_jax.nn.linear import Weight
from sat_jax.nn.loss import next_token_loss
from sat_jax.ops import Implementation
from sat_jax.sparsity.execution.state import Tree
from sat_jax.sparsity.plan import Stored


def block_gradients(
    layout: Layout[Decoder],
    stored: Stored,
    params: Tree,
    batch: Batch,
    implementation: Implementation | None = None,
) -> dict[str, Float[Array, "L R C"]]:
    """Return the norm of the gradient of every block by path of the matrix, of the loss summed over
    a batch. `layout` is that of the model without block-sparse weights; `implementation` that of
    the kernels."""

    def loss(probes: dict[str, Array]) -> Array:
        values = dict(params)
        for path, counts in stored:
            weight = BlockSparse(
                values.pop(f"{path}/blocks"),
                values.pop(f"{path}/columns"),
                layout.shapes[path].shape[1:-1],
                counts.grid[1],
                counts.longest,
                implementation,
            )
            values[path] = ProbedBlocks(weight, probes[path])
        total, _ = next_token_loss(layout.bind(values), *batch)
        return total

    probes = {p: jnp.zeros((layout.layers, *counts.grid), jnp.float32) for p, counts in stored}
    squares = jax.grad(loss)(probes)
    return {path: jnp.sqrt(square) for path, square in squares.items()}


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=("weight", "probe"), meta_fields=()
)
@dataclasses.dataclass(frozen=True)
class ProbedBlocks(Weight):
    """A block-sparse weight; the gradient of `probe`, whose values are not used, is the sum of
    squares of the dense weight's gradient in each block."""

    weight: BlockSparse
    probe: Float[Array, "*L R C"]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the array that the weight stands for."""
        return self.weight.shape

    def project(self, x: Float[Array, "B T D"]) -> Array:
        """Return `x · Wᵀ`, `[B, T, *units]`."""
        y = self.weight.project(x)
        flat = y.reshape(*y.shape[:2], -1)
        return _observed(flat, x, self.probe, True).reshape(y.shape)

    def combine(self, a: Array) -> Float[Array, "B T D"]:
        """Return `a · W` for activations `[B, T, *units]`."""
        flat = a.reshape(*a.shape[:2], -1)
        return _observed(self.weight.combine(a), flat, self.probe, False)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _observed(y: Array, x: Array, probe: Array, output_is_row: bool) -> Array:
    """Return `y`, a product of `x` with a weight, whose gradient reaches `probe`. `output_is_row`:
    rows of the weight are entries of `y`, otherwise of `x`."""
    del x, probe, output_is_row
    return y


def _forward(y: Array, x: Array, probe: Array, output_is_row: bool) -> tuple[Array, Any]:
    del output_is_row
    return y, (x, probe)


def _backward(output_is_row: bool, saved: Any, dy: Array) -> tuple[Array, Array, Array]:
    x, probe = saved
    a, c = (dy, x) if output_is_row else (x, dy)
    gradient = jnp.einsum("BTN,BTD->ND", a, c, preferred_element_type=jnp.float32)
    rows, columns = probe.shape
    blocks = gradient.reshape(rows, -1, columns, gradient.shape[1] // columns)
    return dy, jnp.zeros_like(x), jnp.sum(blocks * blocks, axis=(1, 3))


_observed.defvjp(_forward, _backward)
