"""Types of weights, and the two products that models compute with them.

A weight is an array, or a `Weight`: a pytree that computes the same two products in another way.
A new representation (quantized, low rank, with an adapter) is one subclass; models, branches and
executions stay as they are, since they only call `project`, `combine` and `gated_mlp`.
"""

import dataclasses
import functools
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from sat_jax.ops import InPlace, KernelConfig, kept_combine, kept_mlp, kept_project

Axes = tuple[str, ...]
PRODUCT = "product with a weight"
"""The name under which rematerialisation (`dots`) saves the outputs of `project`."""


class Weight:
    """Base of weights that are no plain array. Subclasses are registered frozen dataclasses.

    The fields `float32` keep their dtype where other arrays are cast to the compute dtype.
    """

    float32: ClassVar[tuple[str, ...]] = ()

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the array that the weight stands for, of one layer or of all."""
        raise NotImplementedError

    def dense(self) -> Array:
        """Return the weight as one array `[*units, D]`."""
        raise NotImplementedError

    def describe(self, axes: Axes) -> dict[str, tuple[Axes, bool]]:
        """Return for each array of the weight, by path inside it ("base/values"), its axes and
        whether it is trained, given the axes of the parameter that the weight stands for."""
        raise NotImplementedError

    def project(self, x: Float[Array, "B T D"]) -> Array:
        """Return `x · Wᵀ`, `[B, T, *units]`."""
        return _project(self.dense(), x)

    def combine(self, a: Array) -> Float[Array, "B T D"]:
        """Return `a · W` for activations `[B, T, *units]`."""
        return _combine(self.dense(), a)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("full", "rows", "kept"),
    meta_fields=("kernel",),
)
@dataclasses.dataclass(frozen=True)
class KeptRows(Weight):
    """The rows `kept` of a full weight, read in place: no compact copy of all layers exists.

    The gradient is that of `rows`, whose values are not used; None: there is no gradient. `kernel`
    computes the products of a matrix `[F, D]`; None: the rows of one layer are gathered for them.
    """

    full: Float[Array, "*L N D"]
    rows: Float[Array, "*L kept D"] | None
    kept: Int[Array, "*L kept"]
    kernel: KernelConfig | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the kept rows, of one layer or of all."""
        return *self.kept.shape, self.full.shape[-1]

    def dense(self) -> Array:
        """Return the kept rows of one layer."""
        if self.rows is None:
            return jax.lax.stop_gradient(_take_rows(self.full, self.kept))
        return rows_in_place(self.full, self.rows, self.kept)

    def project(self, x: Float[Array, "B T D"]) -> Array:
        """Return `x · Wᵀ` of the kept rows."""
        if self.kernel is None:
            return super().project(x)
        return kept_project(x, self.in_place, self.kept, self.kernel)

    def combine(self, a: Array) -> Float[Array, "B T D"]:
        """Return `a · W` of the kept rows."""
        if self.kernel is None:
            return super().combine(a)
        return kept_combine(a, self.in_place, self.kept, self.kernel)

    @property
    def in_place(self) -> InPlace:
        """The matrix of one layer as kernels take it."""
        rows = self.rows
        if rows is None:  # no gradient, so that these values are never read
            rows = jnp.zeros((len(self.kept), self.full.shape[-1]), self.full.dtype)
        return InPlace(self.full, rows)


def value(weight: Any) -> Any:
    """Return the array or `Weight` that a parameter holds."""
    return weight.get_value() if isinstance(weight, nnx.Variable) else weight


def dense(weight: Any) -> Array:
    """Return the weight as one array."""
    array = value(weight)
    return array.dense() if isinstance(array, Weight) else array


def project(weight: Any, x: Float[Array, "B T D"], bias: Any = None) -> Float[Array, "B T *units"]:
    """Return `x · Wᵀ + bias`. A bias is added in float32, the result has the dtype of `x`."""
    w = value(weight)
    y = w.project(x) if isinstance(w, Weight) else _project(w, x)
    return y if bias is None else add_bias(y, bias)


def combine(weight: Any, a: Float[Array, "B T *units"]) -> Float[Array, "B T D"]:
    """Return `a · W`, which is added to the residual stream."""
    w = value(weight)
    return w.combine(a) if isinstance(w, Weight) else _combine(w, a)


def add_bias(y: Float[Array, "B T *units"], bias: Any) -> Float[Array, "B T *units"]:
    """Return `y + bias`, added in float32, so that the gradient of the bias, a sum over tokens, is
    accumulated in float32 too; in the dtype of `y`."""
    vector = dense(bias)
    vector = vector.reshape((1,) * (y.ndim - vector.ndim) + vector.shape)
    return (y.astype(jnp.float32) + vector).astype(y.dtype)


def swiglu(gate: Any, up: Any, x: Float[Array, "B T D"]) -> Float[Array, "B T F"]:
    """Return silu(x · gateᵀ) · (x · upᵀ)."""
    return _silu_product(project(gate, x), project(up, x))


def gated_mlp(gate: Any, up: Any, down: Any, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    """Return silu(x · gateᵀ) · (x · upᵀ) · down, by a fused kernel where the weights have one."""
    weights = [value(w) for w in (gate, up, down)]
    kernel = weights[0].kernel if all(isinstance(w, KeptRows) for w in weights) else None
    if kernel is None:
        if isinstance(weights[2], Weight):
            return combine(down, swiglu(gate, up, x))
        return _gated_combine(project(gate, x), project(up, x), weights[2])
    in_place = [w.in_place for w in weights]
    return kept_mlp(x, in_place[0], in_place[1], in_place[2], weights[0].kept, kernel)


def _project(w: Array, x: Array) -> Array:
    # Named, since `jax.checkpoint` does not look for products inside custom derivatives.
    return checkpoint_name(_product(w, x), PRODUCT)


@jax.custom_vjp
def _product(w: Array, x: Array) -> Array:
    return jnp.tensordot(x, w, (-1, -1))


def _product_forward(w: Array, x: Array) -> tuple[Array, tuple[Array, Array]]:
    return _product(w, x), (w, x)


def _product_backward(saved: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
    w, x = saved
    return weight_gradient(x, dy), jnp.tensordot(dy, w, w.ndim - 1)


_product.defvjp(_product_forward, _product_backward)


def weight_gradient(x: Float[Array, "B T D"], dy: Float[Array, "B T *units"]) -> Array:
    """Return the gradient `[*units, D]` of W in `x · Wᵀ`, given that of the product.

    It is computed as (xᵀ · dy)ᵀ. For dyᵀ · x, its usual form, XLA:CPU first writes a transposed
    copy of `dy`, which is slower than the product.
    """
    tokens = tuple(range(x.ndim - 1))
    return jnp.moveaxis(jnp.tensordot(x, dy, (tokens, tokens)), 0, -1)


@jax.custom_vjp
def _silu_product(gate_x: Array, up_x: Array) -> Array:
    """Return silu(gate_x) · up_x. Only its two arguments are saved for the backward pass."""
    return jax.nn.silu(gate_x) * up_x


def _silu_product_forward(gate_x: Array, up_x: Array) -> tuple[Array, tuple[Array, Array]]:
    return _silu_product(gate_x, up_x), (gate_x, up_x)


def _silu_product_backward(saved: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
    gate_x, up_x, dy = (x.astype(jnp.float32) for x in (*saved, dy))
    sigmoid = jax.nn.sigmoid(gate_x)
    d_gate = dy * up_x * sigmoid * (1 + gate_x * (1 - sigmoid))
    return d_gate.astype(saved[0].dtype), (dy * gate_x * sigmoid).astype(saved[1].dtype)


_silu_product.defvjp(_silu_product_forward, _silu_product_backward)


@jax.custom_vjp
def _gated_combine(gate_x: Array, up_x: Array, down: Array) -> Array:
    """Return silu(gate_x) · up_x · down. The backward pass computes the activation again: saving it
    for each layer takes longer."""
    return _combine(down, _silu_product(gate_x, up_x))


def _gated_combine_forward(gate_x: Array, up_x: Array, down: Array) -> tuple[Array, Any]:
    return _gated_combine(gate_x, up_x, down), (gate_x, up_x, down)


def _gated_combine_backward(saved: Any, dy: Array) -> tuple[Array, Array, Array]:
    gate_x, up_x, down = saved
    a, gradient = jax.vjp(_silu_product, gate_x, up_x)
    d_down = weight_gradient(dy, a)
    return (*gradient(_product(down, dy)), d_down)


_gated_combine.defvjp(_gated_combine_forward, _gated_combine_backward)


def _combine(w: Array, a: Array) -> Array:
    units = range(a.ndim - 3, -1, -1)  # innermost first
    return jax.lax.dot_general(a, w, (([2 + n for n in units], list(units)), ((), ())))


@jax.custom_vjp
def rows_in_place(full: Array, rows: Array, kept: Int[Array, "*K kept"]) -> Array:
    """Return the kept rows of one layer's array `full`. The gradient is that of `rows`, whose
    values are not used."""
    del rows
    return _take_rows(full, kept)


def _take_rows(full: Array, kept: Int[Array, "*K kept"]) -> Array:
    """Rows at `kept`, which may have axes of units in front, of which each has rows of its own."""
    take = functools.partial(
        jnp.take, axis=0, unique_indices=True, indices_are_sorted=True, mode="clip"
    )
    for _ in kept.shape[1:]:
        take = jax.vmap(take)
    return take(full, kept)


def _rows_forward(full: Array, rows: Array, kept: Array) -> tuple[Array, None]:
    return rows_in_place(full, rows, kept), None


def _rows_backward(_: None, gradient: Array) -> tuple[None, Array, None]:
    return None, gradient, None


rows_in_place.defvjp(_rows_forward, _rows_backward)
