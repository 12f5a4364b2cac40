"""Low-rank adapters: LoRA (Hu et al., arXiv:2106.09685), rsLoRA (Kalajdzievski, arXiv:2312.03732)
and DoRA (Liu et al., arXiv:2402.09353)."""

import dataclasses
import functools
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from sat_jax.nn.linear import Axes, Weight, combine, dense, project
from sat_jax.nn.low_rank import LowRank

TRAINED = ("norms", "embeddings")
"""Parameters that can be trained in full beside adapters: scales and shifts of norms; tables of
tokens and positions, and the output head."""

BASES = ("nf4", "int4", "int8")
"""Forms in which frozen matrices can be stored (`nn.quantized.Packing`), by name."""


@dataclasses.dataclass(frozen=True)
class LoraSettings:
    """Adapters of a model. `targets`: names of matrices of layers ("query", "mlp/gate"); none: all.
    `trained`: names in `TRAINED`."""

    rank: int = 8
    alpha: float = 16.0
    targets: tuple[str, ...] = ()
    rslora: bool = False
    dora: bool = False
    trained: tuple[str, ...] = ()


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("base", "update", "magnitude"),
    meta_fields=("alpha", "rslora", "writes"),
)
@dataclasses.dataclass(frozen=True)
class Lora(Weight):
    """A frozen weight plus `scale` times one of low rank, whose factors are trained.

    As the matrix `[out, in]` of the literature, W + scale · B · A: `update` is B · A, and where the
    weight `writes` to the residual stream, so that its array is the transpose, Aᵀ · Bᵀ.

    `magnitude` (DoRA) has the norm of the weights of each output, `[*L, *units]` or, where the
    weight `writes`, `[*L, D]`. The sum is scaled to these norms, and its own norm is a constant in
    differentiation (DoRA, section 4.3). None: the sum is not scaled.
    """

    base: Any
    update: LowRank
    magnitude: Float[Array, "*out"] | None = None
    alpha: float = 1.0
    rslora: bool = False
    writes: bool = False
    float32: ClassVar[tuple[str, ...]] = ("magnitude",)

    @property
    def scale(self) -> float:
        """alpha / rank, and in rsLoRA alpha / √rank."""
        rank = self.update.rank
        return self.alpha / (math.sqrt(rank) if self.rslora else rank)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the array that the weight stands for, of one layer or of all."""
        return self.update.shape

    def dense(self) -> Array:
        """Return the merged array, of one layer or of all."""
        merged = self._sum()
        if self.magnitude is None:
            return merged
        gain = jnp.expand_dims(self._gain(merged), self._input_axes(merged))
        return (merged * gain).astype(merged.dtype)

    def describe(self, axes: Axes) -> dict[str, tuple[Axes, bool]]:
        """Return the axes of the base, which is frozen, and of what is trained."""
        base = self.base.describe(axes) if isinstance(self.base, Weight) else {"": (axes, True)}
        arrays = {
            f"base/{path}" if path else "base": (own, False) for path, (own, _) in base.items()
        }
        factors = self.update.describe(axes)
        arrays |= {f"update/{path}": described for path, described in factors.items()}
        if self.magnitude is not None:
            arrays["magnitude"] = (axes[:1] + axes[-1:] if self.writes else axes[:-1], True)
        return arrays

    def project(self, x: Float[Array, "B T D"]) -> Array:
        """Return `x · Wᵀ`, `[B, T, *units]`."""
        return self._scaled(project(self.base, x) + self.scale * self.update.project(x))

    def combine(self, a: Array) -> Float[Array, "B T D"]:
        """Return `a · W` for activations `[B, T, *units]`."""
        return self._scaled(combine(self.base, a) + self.scale * self.update.combine(a))

    def _sum(self) -> Array:
        return dense(self.base) + self.scale * self.update.dense()

    def _scaled(self, y: Array) -> Array:
        """Return outputs of one layer scaled to the magnitudes, in their dtype."""
        if self.magnitude is None:
            return y
        gain = self._gain(self._sum())
        return (y.astype(jnp.float32) * gain[None, None]).astype(y.dtype)

    def _gain(self, merged: Array) -> Array:
        """Return the magnitude of each output relative to the norm of its weights."""
        assert self.magnitude is not None
        norms = output_norms(merged, self._input_axes(merged))
        return self.magnitude / jax.lax.stop_gradient(norms)

    def _input_axes(self, merged: Array) -> tuple[int, ...]:
        """Return the axes over which an output sums."""
        assert self.magnitude is not None
        if not self.writes:
            return (merged.ndim - 1,)
        return tuple(range(self.magnitude.ndim - 1, merged.ndim - 1))


def new_lora(
    base: Float[Array, "L *units D"] | Weight,
    settings: LoraSettings,
    writes: bool,
    key: PRNGKeyArray,
) -> Lora:
    """Return an adapted weight that equals its base: A is uniform within ±1/√(number of inputs), as
    in PEFT, and B is 0. The base has all layers."""
    layers, *units, width = base.shape
    bound = (math.prod(units) if writes else width) ** -0.5

    def uniform(*shape: int) -> Array:
        return jax.random.uniform(key, shape, jnp.float32, -bound, bound)

    left, right = (layers, *units, settings.rank), (layers, settings.rank, width)
    if writes:
        update = LowRank(uniform(*left), jnp.zeros(right))
    else:
        update = LowRank(jnp.zeros(left), uniform(*right))
    lora = Lora(base, update, None, settings.alpha, settings.rslora, writes)
    if not settings.dora:
        return lora
    axes = range(1, len(units) + 1) if writes else (len(units) + 1,)
    return dataclasses.replace(lora, magnitude=output_norms(dense(base), tuple(axes)))


def output_norms(weight: Array, input_axes: tuple[int, ...]) -> Array:
    """Return the norm of the weights of each output, float32."""
    return jnp.sqrt(jnp.sum(jnp.square(weight.astype(jnp.float32)), axis=input_axes))
