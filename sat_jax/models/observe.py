"""What is observed of one layer's inputs and outputs: sums over the tokens of a batch."""

from collections.abc import Collection
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from sat_jax.models.attention import Attention, output_energy
from sat_jax.models.low_rank import predicted_channels, predicted_values
from sat_jax.models.mlp import MLP
from sat_jax.sparsity.statistics import InputSums, Observable


def attention_input(
    observe: Collection[Observable],
    attention: Attention,
    x_BTD: Float[Array, "B T D"],
    weight_BT: Float[Array, "B T"],
) -> dict[str, Any]:
    """Fields of `Statistics` that the normed input of a layer's attention gives, without the layer
    axis."""
    seen: dict[str, Any] = {}
    if "inputs" in observe:
        seen["attention"] = _input_sums(x_BTD, weight_BT)
    if "predicted" in observe:
        output = attention.output[...]
        value_BTKGE = predicted_values(x_BTD, attention.value[...], output.shape[1])
        seen["heads"] = output_energy(value_BTKGE, output, weight_BT)
    return seen


def mlp_input(
    observe: Collection[Observable],
    mlp: MLP,
    x_BTD: Float[Array, "B T D"],
    weight_BT: Float[Array, "B T"],
) -> dict[str, Any]:
    """The same of a layer's MLP."""
    seen: dict[str, Any] = {}
    if "inputs" in observe:
        seen["mlp"] = _input_sums(x_BTD, weight_BT)
    if "predicted" in observe:
        a_BTF = predicted_channels(x_BTD, mlp.gate[...], mlp.up[...])
        seen["channels"] = channel_squares(a_BTF, weight_BT)
    return seen


def channel_squares(
    a_BTF: Float[Array, "B T F"], weight_BT: Float[Array, "B T"]
) -> Float[Array, " F"]:
    """Σ over tokens of each channel's squared activation, float32."""
    return jnp.einsum("BTF,BT->F", jnp.square(a_BTF.astype(jnp.float32)), weight_BT)


def column_products(
    a: Float[Array, "B T *columns"], weight_BT: Float[Array, "B T"]
) -> Float[Array, "C C"]:
    """Σ over tokens of a_i · a_j for every pair of columns, float32."""
    a_BTC = a.reshape(*a.shape[:2], -1).astype(jnp.float32)
    return jnp.einsum("BTC,BTF->CF", a_BTC * weight_BT[..., None], a_BTC)


def _input_sums(x_BTD: Float[Array, "B T D"], weight_BT: Float[Array, "B T"]) -> InputSums:
    x = x_BTD.astype(jnp.float32)
    return InputSums(
        jnp.einsum("BTD,BT->D", x * x, weight_BT), jnp.einsum("BTD,BT->D", x, weight_BT)
    )
