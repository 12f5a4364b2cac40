"""The gated MLP (SwiGLU), channel-major: keeping a channel is taking a row of three matrices."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from sat_jax.models.layers import (
    Mask,
    Offset,
    WholeMatrices,
    indicator,
    normal,
    rows_in_place,
    with_offset,
)
from sat_jax.models.llama_config import LlamaConfig
from sat_jax.ops import InPlace, KernelConfig, kept_mlp
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
        kernels: KernelConfig | None = None,
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
        adds = told and segment.compensate
        offset_shape = (*kept_shape, config.d_model)
        self.down_offset = Offset(jnp.zeros(offset_shape)) if adds else None
        self.inverted = False
        self.kernels = kernels
        in_place = told and kernels is not None
        whole_shape = (segment.layers, config.d_ff, config.d_model)
        matrices = dict.fromkeys(MATRICES, jnp.zeros(whole_shape)) if in_place else {}
        self.whole = WholeMatrices(kept, matrices) if in_place else None
        self.scale = config.d_ff / segment.channels if segment.rescale else 1.0

    def __call__(
        self, x_BTD: Float[Array, "B T D"], whole_BT: Bool[Array, "B T"] | None = None
    ) -> Float[Array, "B T D"]:
        """What one layer adds to the residual stream: `combine` of what `activate` makes, and where
        kernels compute it, all at once."""
        if self.whole is None or self.kernels is None:
            return self.combine(self.activate(x_BTD, whole_BT))
        assert whole_BT is None, "kernels omit the same for all tokens"
        gate, up, down = (
            InPlace(self.whole.matrix(name), getattr(self, name)[...]) for name in MATRICES
        )
        kept = self.whole.kept[...]
        return self.scale * kept_mlp(x_BTD, gate, up, down, kept, self.kernels)

    def activate(
        self, x_BTD: Float[Array, "B T D"], whole_BT: Bool[Array, "B T"] | None = None
    ) -> Float[Array, "B T F"]:
        """Each channel's activation silu(x·gate)·(x·up) of one layer (the L axis taken away).

        `whole_BT`: tokens for which mask execution omits nothing.
        """
        gate_BTF = jnp.einsum("BTD,FD->BTF", x_BTD, self._rows("gate"))
        up_BTF = jnp.einsum("BTD,FD->BTF", x_BTD, self._rows("up"))
        a_BTF = jax.nn.silu(gate_BTF) * up_BTF
        if self.kept_channels is None:
            return a_BTF
        keep_BTF = indicator(self.kept_channels[...], a_BTF.shape[-1], a_BTF.dtype)[None, None]
        if whole_BT is not None:
            keep_BTF = jnp.where(whole_BT[..., None], 1, keep_BTF)
        return a_BTF * (1 - keep_BTF if self.inverted else keep_BTF)

    def combine(self, a_BTF: Float[Array, "B T F"]) -> Float[Array, "B T D"]:
        """What the channels add to the residual stream."""
        down_FD = with_offset(self._rows("down"), self.down_offset, self.kept_channels)
        return self.scale * jnp.einsum("BTF,FD->BTD", a_BTF, down_FD)

    def others(self) -> "MLP | None":
        """One layer's module of the omitted channels, where the weights are whole; None: there are
        none. Its parameters are not for training."""
        if self.kept_channels is None and self.whole is None:
            return None
        rest: MLP = nnx.merge(*nnx.split(self))
        rest.inverted = True
        if self.whole is not None:
            rest.whole = self.whole.others(len(self.whole.matrix("gate")))
            shape = (*rest.whole.kept.shape, self.gate.shape[1])
            for name in MATRICES:  # without a gradient, so that their values are read nowhere
                setattr(rest, name, nnx.Param(jnp.zeros(shape, self.gate.dtype)))
        return rest

    def _rows(self, name: str) -> Float[Array, "F D"]:
        """A matrix, of which the kept rows are taken from where they lie."""
        own: Array = getattr(self, name)[...]
        if self.whole is None:
            return own
        return rows_in_place(self.whole.matrix(name), own, self.whole.kept[...])
