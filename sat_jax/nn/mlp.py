"""MLPs, channel-major: a channel is a row of each matrix."""

from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from sat_jax.nn.block_sparse import ACTIVATIONS, BlockSparse, block_sparse_mlp
from sat_jax.nn.block_sparse import Activation as Activation
from sat_jax.nn.branch import Branch
from sat_jax.nn.context import Context
from sat_jax.nn.linear import dense, gated_mlp, project, swiglu, value
from sat_jax.nn.param import CHANNEL, normal, param

GatedActivation = Literal[Activation, "silu"]


class GatedMLP(Branch):
    """A gated MLP (Shazeer, arXiv:2002.05202): activation(x · gate) · (x · up) of each channel;
    with `silu`, SwiGLU, products and activation are fused.

    `gate`, `up` and `down` are `[L, F, D]`.
    """

    units = (CHANNEL,)

    def __init__(
        self,
        *,
        layers: int,
        channels: int,
        embed: int,
        activation: GatedActivation = "silu",
        out_scale: float,
        rngs: nnx.Rngs,
    ):
        super().__init__()
        axes = {"layer": layers, "channel": channels, "embed": embed}
        self.gate = param(normal(rngs, 0.02), axes)
        self.up = param(normal(rngs, 0.02), axes)
        self.down = param(normal(rngs, out_scale), axes, "write")
        self.activation = activation

    def activations(self, x: Float[Array, "B T D"], context: Context) -> Float[Array, "B T F"]:
        """Return activation(x · gate) · (x · up)."""
        del context
        if self.activation == "silu":
            return swiglu(self.gate, self.up, x)
        return ACTIVATIONS[self.activation](project(self.gate, x)) * project(self.up, x)

    def apply(self, x: Float[Array, "B T D"], context: Context) -> Float[Array, "B T D"]:
        """Return the sum over channels, by one fused operation where the weights allow it."""
        if self.activation != "silu":
            return super().apply(x, context)
        return gated_mlp(self.gate, self.up, self.down, x)

    def predicted_activations(self, x: Float[Array, "B T D"]) -> Float[Array, "B T F"]:
        """Return the activations with gate and up projection at low rank."""
        activation = jax.nn.silu if self.activation == "silu" else ACTIVATIONS[self.activation]
        return activation(self.predicted("gate", x)) * self.predicted("up", x)


class MLP(Branch):
    """A plain MLP: activation(x · up + bias) of each channel.

    `up` and `down` are `[L, F, D]`, `up_bias` is `[L, F]`. The bias of the output belongs to the
    block.
    """

    units = (CHANNEL,)

    def __init__(
        self,
        *,
        layers: int,
        channels: int,
        embed: int,
        activation: Activation,
        out_scale: float,
        rngs: nnx.Rngs,
    ):
        super().__init__()
        axes = {"layer": layers, "channel": channels, "embed": embed}
        self.up = param(normal(rngs, 0.02), axes)
        self.up_bias = param(jnp.zeros, {"layer": layers, "channel": channels}, "vector")
        self.down = param(normal(rngs, out_scale), axes, "write")
        self.activation = activation

    def activations(self, x: Float[Array, "B T D"], context: Context) -> Float[Array, "B T F"]:
        """Return activation(x · up + bias)."""
        del context
        return ACTIVATIONS[self.activation](project(self.up, x, self.up_bias))

    def apply(self, x: Float[Array, "B T D"], context: Context) -> Float[Array, "B T D"]:
        """Return the sum over channels, by one fused operation if both weights are blocks."""
        up, down = value(self.up), value(self.down)
        blocks = isinstance(up, BlockSparse) and isinstance(down, BlockSparse)
        if blocks and up.implementation == down.implementation:
            return block_sparse_mlp(up, dense(self.up_bias), down, x, self.activation)
        return super().apply(x, context)

    def predicted_activations(self, x: Float[Array, "B T D"]) -> Float[Array, "B T F"]:
        """Return the activations with the up projection at low rank."""
        up_x = self.predicted("up", x) + dense(self.up_bias)[None, None]
        return ACTIVATIONS[self.activation](up_x)
