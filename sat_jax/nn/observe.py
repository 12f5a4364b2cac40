"""Observations of a branch: sums over the tokens of a batch, float32."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sat_jax.nn.linear import dense


class InputSums(NamedTuple):
    """Sums over tokens of a branch's normed input x, or of the columns of its activations: `square`
    Σx², `linear` Σx, both `[*L, D]`."""

    square: Float[Array, "*L D"]
    linear: Float[Array, "*L D"]


def input_sums(x_BTD: Float[Array, "B T D"], weight_BT: Float[Array, "B T"]) -> InputSums:
    """Return the sums over the tokens whose weight is 1."""
    x = x_BTD.astype(jnp.float32)
    return InputSums(
        jnp.einsum("BTD,BT->D", x * x, weight_BT), jnp.einsum("BTD,BT->D", x, weight_BT)
    )


class MagnitudeSums(NamedTuple):
    """Sums over tokens of the columns of an input or of activations: `square` Σx², `absolute` Σ|x|,
    both `[C]`."""

    square: Float[Array, " C"]
    absolute: Float[Array, " C"]


def magnitude_sums(
    x: Float[Array, "B T *columns"], weight_BT: Float[Array, "B T"]
) -> MagnitudeSums:
    """Return the sums over the tokens whose weight is 1."""
    x_BTC = x.reshape(*x.shape[:2], -1).astype(jnp.float32)
    return MagnitudeSums(
        jnp.einsum("BTC,BT->C", x_BTC * x_BTC, weight_BT),
        jnp.einsum("BTC,BT->C", jnp.abs(x_BTC), weight_BT),
    )


def output_energy(
    a: Float[Array, "B T *units"],
    write: Any,
    weight_BT: Float[Array, "B T"],
    units: int,
) -> Array:
    """Return what each of `units` nested units adds to the residual stream, as a sum of squares.
    `write` is the weight `[*units, D]` that the activations are multiplied with.

    An activation of one number a unit, `[B, T, F]`: Σa², `[F]`, without the norm of its output row,
    which scores multiply it by. Vectors `[B, T, *outer, G, E]`: Σ⟨a_g W_g, a_h W_h⟩ of every pair
    of innermost units, `[*outer, G, G]`. The diagonal is ‖a_g W_g‖² of each unit, and the sum over
    all pairs that of the unit around them. Through Gram matrices, so that no `[tokens, units, D]`
    array exists.
    """
    if a.ndim == 2 + units:
        return jnp.einsum("BT...,BT->...", jnp.square(a.astype(jnp.float32)), weight_BT)
    outer = a.shape[2 : 1 + units]
    a = a.astype(jnp.float32) * weight_BT.reshape(weight_BT.shape + (1,) * (a.ndim - 2))
    a_BTKGE = a.reshape(*a.shape[:2], -1, *a.shape[1 + units :])
    w = dense(write).astype(jnp.float32)
    w_KGED = w.reshape(-1, *w.shape[units - 1 :])
    mixes = jnp.einsum("BTKGE,BTKHF->KGEHF", a_BTKGE, a_BTKGE)
    weights = jnp.einsum("KGED,KHFD->KGEHF", w_KGED, w_KGED)
    pairs = jnp.einsum("KGEHF,KGEHF->KGH", mixes, weights)
    return pairs.reshape(*outer, *pairs.shape[1:])


def column_products(
    a: Float[Array, "B T *columns"], weight_BT: Float[Array, "B T"]
) -> Float[Array, "C C"]:
    """Return Σ a_i · a_j for every pair of columns. In full float32 on all devices, as linear
    systems are solved with them."""
    a_BTC = a.reshape(*a.shape[:2], -1).astype(jnp.float32)
    return jnp.einsum(
        "BTC,BTF->CF", a_BTC * weight_BT[..., None], a_BTC, precision=jax.lax.Precision.HIGHEST
    )
