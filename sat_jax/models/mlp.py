"""The gated MLP (SwiGLU), channel-major: keeping a channel is taking a row of three matrices."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from sat_jax.models.layers import Mask, WholeMatrices, indicator, normal
from sat_jax.models.llama_config import LlamaConfig
from sat_jax.ops import BlockSparse, InPlace, kept_down, kept_swiglu
from sat_jax.sparsity.plan import Segment

MATRICES = ("gate", "up", "down")


class MLP(nnx.Module):
    """MLP weights of the layers of one segment: `gate`, `up` and `down` are `[L, F, D]`.

    F is the number of kept channels; in mask execution F stays whole and `kept_channels`
    `[L, kept]` holds the kept indices. `live`: F stays whole, and what is kept is chosen later (see
    `models.live`). `kernels`: they compute with `whole`, of which `gate`, `up` and `down` are the
    kept rows and no more than what has the gradient.
    """

    def __init__(
        self,
        config: LlamaConfig,
        segment: Segment,
        *,
        masked: bool = False,
        live: bool = False,
        kernels: BlockSparse | None = None,
        rngs: nnx.Rngs,
    ):
        told = not live and segment.channels < config.d_ff
        masked = told and masked
        kept_shape = (segment.layers, segment.channels)
        shape = (
            segment.layers,
            config.d_ff if masked or live else segment.channels,
            config.d_model,
        )
        self.gate = nnx.Param(normal(rngs, shape, 0.02))
        self.up = nnx.Param(normal(rngs, shape, 0.02))
        self.down = nnx.Param(normal(rngs, shape, 0.02 / (2 * config.n_layers) ** 0.5))
        kept = jnp.broadcast_to(jnp.arange(segment.channels, dtype=jnp.int32), kept_shape)
        self.kept_channels = Mask(kept) if masked else None
        self.kernels = kernels
        in_place = told and kernels is not None
        whole_shape = (segment.layers, config.d_ff, config.d_model)
        matrices = dict.fromkeys(MATRICES, jnp.zeros(whole_shape)) if in_place else {}
        self.whole = WholeMatrices(kept, matrices) if in_place else None
        self.scale = config.d_ff / segment.channels if segment.rescale else 1.0

    def activate(
        self, x_BTD: Float[Array, "B T D"], whole_BT: Bool[Array, "B T"] | None = None
    ) -> Float[Array, "B T F"]:
        """Each channel's activation silu(x·gate)·(x·up) of one layer (the L axis taken away).

        `whole_BT`: tokens for which mask execution omits nothing.
        """
        if self.whole is not None and self.kernels is not None:
            assert whole_BT is None, "kernels omit the same for all tokens"
            gate = InPlace(self.whole.matrix("gate"), self.gate[...])
            up = InPlace(self.whole.matrix("up"), self.up[...])
            return kept_swiglu(x_BTD, gate, up, self.whole.kept[...], self.kernels)
        gate_BTF = jnp.einsum("BTD,FD->BTF", x_BTD, self.gate[...])
        up_BTF = jnp.einsum("BTD,FD->BTF", x_BTD, self.up[...])
        a_BTF = jax.nn.silu(gate_BTF) * up_BTF
        if self.kept_channels is None:
            return a_BTF
        keep_BTF = indicator(self.kept_channels[...], a_BTF.shape[-1], a_BTF.dtype)[None, None]
        if whole_BT is not None:
            keep_BTF = jnp.where(whole_BT[..., None], 1, keep_BTF)
        return a_BTF * keep_BTF

    def combine(self, a_BTF: Float[Array, "B T F"]) -> Float[Array, "B T D"]:
        """What the channels add to the residual stream."""
        if self.whole is not None and self.kernels is not None:
            down = InPlace(self.whole.matrix("down"), self.down[...])
            return self.scale * kept_down(a_BTF, down, self.whole.kept[...], self.kernels)
        return self.scale * jnp.einsum("BTF,FD->BTD", a_BTF, self.down[...])
