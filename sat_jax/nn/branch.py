"""A branch of a residual block: a sum over units (heads, channels), of which some may be omitted.

`Branch` applies masks, computes the forward pass of omitted units, reports statistics of inputs and
activations, and selects units from the current batch. The subclasses in model families contain none
of this; they define `activations`.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from sat_jax.nn.context import Context, Observable
from sat_jax.nn.linear import combine, dense, value
from sat_jax.nn.low_rank import LowRank, approximation
from sat_jax.nn.observe import column_products, input_sums, magnitude_sums, output_energy
from sat_jax.nn.param import Control, Mask

_OF_ACTIVATIONS: set[Observable] = {"activations", "outputs", "magnitudes", "products"}


class Branch(nnx.Module):
    """Base of attention and MLP: the branch of one layer, or of all layers with a leading axis L.

    `units` are the names of nested units, outermost first. They are names of parameter axes, and
    unique in a model. `masks` has a `Mask` for each name. `complement` is a branch of the omitted
    units, added in the forward pass only; None: the forward pass omits them too. `predictors`
    are low-rank approximations of matrices by name, where these were computed once. `has_backward`
    is True in layers where the branch has a backward pass, `[L]`; None: in all.
    """

    units: ClassVar[tuple[str, ...]]
    caches_tokens: ClassVar[bool] = False
    """Whether the cache of decoding has an entry for each token."""
    scored_by: ClassVar[tuple[str, ...]] = ()
    """The matrices whose products are reported as `norms`, in place of activations."""

    def __init__(self) -> None:
        self.masks = nnx.Dict({unit: Mask(None) for unit in self.units})
        self.predictors: nnx.Dict[Any] = nnx.Dict()
        self.complement: Branch | None = nnx.data(None)
        self.has_backward = Control(None)

    def activations(self, x: Float[Array, "B T D"], context: Context) -> Array:
        """Return the activation of each unit, `[B, T, *units, ...]`."""
        raise NotImplementedError

    def predicted_activations(self, x: Float[Array, "B T D"]) -> Array:
        """Return the float32 activations that low-rank approximations of the weights predict."""
        raise NotImplementedError

    def predictor(self, name: str) -> LowRank:
        """Return the low-rank approximation of the matrix with this name, of one layer."""
        if name in self.predictors:
            known: LowRank = value(self.predictors[name])
            return known
        return approximation(dense(getattr(self, name)))

    def predicted(self, name: str, x: Float[Array, "B T D"]) -> Array:
        """Return `x · Wᵀ` with the approximation of this matrix, `[B, T, *units]`, float32."""
        return self.predictor(name).project(x.astype(jnp.float32))

    def predicted_squares(
        self, x: Float[Array, "B T D"], weight_BT: Float[Array, "B T"]
    ) -> dict[str, Array]:
        """Return the sums over tokens of the squares of predicted products with the matrices in
        `scored_by`, by name; if there are none, of the predicted activation of each unit."""
        if self.scored_by:
            return {n: self.predictor(n).project_squares(x, weight_BT) for n in self.scored_by}
        squares = jnp.square(self.predicted_activations(x))
        return {"activation": jnp.einsum("BT...,BT->...", squares, weight_BT)}

    def apply(self, x: Float[Array, "B T D"], context: Context) -> Float[Array, "B T D"]:
        """Return what all units of the branch add to the residual stream."""
        return combine(self.output_weight, self.activations(x, context))

    def empty_cache(self, batch: int, slots: int, dtype: str) -> dict[str, Array]:
        """Return empty cache arrays `[L, B, ...]` of this branch, for decoding; by tokens `slots`
        of them."""
        del batch, slots, dtype
        return {}

    def mixing_flops(self, length: float) -> float:
        """Return the FLOPs per token and innermost unit that are not products with weights, such as
        attention scores, for rows of `length` tokens."""
        del length
        return 0.0

    @property
    def output_weight(self) -> nnx.Param:
        """The parameter whose rows write to the residual stream."""
        return next(p for p in vars(self).values() if getattr(p, "role", None) == "write")

    def __call__(self, x: Float[Array, "B T D"], context: Context) -> Float[Array, "B T D"]:
        """Return what the branch adds to the residual stream, and report observations."""
        branch = self
        if context.selection is not None:
            branch, kept = context.selection(self, x, context)
            for unit, indices in kept.items():
                context.report("kept", unit, indices)
        self._observe_input(x, context)
        computed = self.has_backward.get_value()
        if computed is None:
            return self._sum(branch, x, context)
        # Its own context: what is observed inside a conditional cannot leave it.
        unobserved = _unobserved(context)
        return jax.lax.cond(
            computed,
            lambda x: self._sum(branch, x, unobserved),
            lambda x: jax.lax.stop_gradient(self._sum(branch, x, unobserved)),
            x,
        )

    def _sum(self, branch: "Branch", x: Array, context: Context) -> Array:
        """Return the sum over the units of `branch`, and over those of the complement."""
        masks = [m for mask in branch.masks.values() if (m := mask.get_value()) is not None]
        if masks or _OF_ACTIVATIONS & set(context.observe):
            a = branch.activations(x, context)
            for mask in masks:
                shape = (1, 1, *mask.shape, *(1,) * (a.ndim - 2 - mask.ndim))
                # In float32: the gradient of a mask is a sum over tokens.
                a = (a.astype(jnp.float32) * mask.reshape(shape)).astype(a.dtype)
            branch._observe_output(a, context)
            y = combine(branch.output_weight, a)
        else:
            y = branch.apply(x, context)
        # The output weight of a complement is None in a segment that omits nothing.
        if self.complement is not None and value(self.complement.output_weight) is not None:
            y = y + jax.lax.stop_gradient(self.complement(x, _unobserved(context)))
        return y

    def _observe_input(self, x: Array, context: Context) -> None:
        unit, weight = self.units[-1], context.weight_BT
        if "inputs" in context.observe:
            context.report("inputs", unit, input_sums(x, weight))
        if "input_magnitudes" in context.observe:
            context.report("input_magnitudes", unit, magnitude_sums(x, weight))
        if "input_products" in context.observe:
            context.report("input_products", unit, column_products(x, weight))
        if "predicted" in context.observe:
            a, units = self.predicted_activations(x), len(self.units)
            context.report("outputs", unit, output_energy(a, self.output_weight, weight, units))
        if "norms" in context.observe:
            context.report("norms", unit, self.predicted_squares(x, weight))

    def _observe_output(self, a: Array, context: Context) -> None:
        unit, weight = self.units[-1], context.weight_BT
        if "outputs" in context.observe:
            units = len(self.units)
            context.report("outputs", unit, output_energy(a, self.output_weight, weight, units))
        if "activations" in context.observe:
            columns = a.reshape(*a.shape[:2], -1)
            context.report("activations", unit, input_sums(columns, weight))
        if "magnitudes" in context.observe:
            context.report("magnitudes", unit, magnitude_sums(a, weight))
        if "products" in context.observe:
            context.report("products", unit, column_products(a, weight))


def branches(block: Any) -> dict[str, Branch]:
    """Return the branches of a block by name, in alphabetical order."""
    return {k: v for k, v in sorted(vars(block).items()) if isinstance(v, Branch)}


def set_backward(block: Any, computed: Mapping[str, Any]) -> None:
    """Set by name which branches of a block have a backward pass: bools `[L]`, or a tuple of them
    with one entry for each segment."""
    for name, branch in branches(block).items():
        if name in computed:
            branch.has_backward.set_value(computed[name])


def _unobserved(context: Context) -> Context:
    if context.cache is not None:
        raise ValueError("a model whose forward pass has omitted units apart cannot decode")
    return Context(context.segment_ids, context.rotary, context.attention, context.retention)
