"""Inputs shared by the layers of a model, observations of a layer, and the decoding cache."""

import dataclasses
from collections.abc import Collection, Sequence
from typing import Any, Literal, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, Shaped

from sat_jax.nn.attention.dot_product import Implementation
from sat_jax.ops import RetentionKernel

Observable = Literal[
    "inputs",
    "activations",
    "outputs",
    "predicted",
    "norms",
    "input_magnitudes",
    "magnitudes",
    "input_products",
    "products",
    "hidden",
]
"""The names of observations of a branch: `inputs` and `activations` are sums of its inputs and of
its activations by column (`InputSums`), `input_magnitudes` and `magnitudes` the same with absolute
values (`MagnitudeSums`), `input_products` and `products` those of all pairs of columns. `outputs`
and `predicted` are energies of outputs, of the weights themselves or of low-rank ones; `norms` are
sums of squares that low-rank weights predict (`Branch.predicted_squares`). `hidden` is no sum, and
not of a branch: the residual stream after each layer, `[B, T, D]`."""
HIDDEN: Observable = "hidden"
Observed = dict[str, dict[str, Any]]
"""Observations by kind and by the innermost unit of the branch; the kind `kept` has the units that
a dynamic selection kept, by unit."""


class Cache(NamedTuple):
    """The state of decoding after the tokens so far: arrays of all layers by name, and the tokens.

    Slots 0, 1, …, `used` - 1 of S are filled in `arrays`; `tokens`, `segment_ids` and `positions`
    may be ahead. `segment_ids`: 1 for a row's tokens, 0 for padding; a slot is seen by later slots
    with the same number, so padding may stand anywhere. S is 0 where no branch reads past tokens.
    """

    arrays: dict[str, Shaped[Array, "L B ..."]]
    tokens: Int[Array, "B S"]
    segment_ids: Int[Array, "B S"]
    positions: Int[Array, "B S"]
    used: Int[Array, ""]

    def write(
        self,
        tokens: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"],
        positions: Int[Array, "B T"],
    ) -> "Cache":
        """Return the cache with T tokens in the slots after the used ones, not yet computed; a
        cache without slots as it is."""
        if not self.tokens.shape[1]:
            return self

        def updated(array: Array, new: Array) -> Array:
            return jax.lax.dynamic_update_slice(array, new, (0, self.used))

        return self._replace(
            tokens=updated(self.tokens, tokens),
            segment_ids=updated(self.segment_ids, segment_ids),
            positions=updated(self.positions, positions),
        )

    def newest(self, count: int) -> tuple[Int[Array, "B T"], ...]:
        """Return the tokens, segments and positions of the next `count` slots to compute."""
        return tuple(
            jax.lax.dynamic_slice_in_dim(array, self.used, count, axis=1)
            for array in (self.tokens, self.segment_ids, self.positions)
        )

    def row_lengths(self, slots: int | Int[Array, ""]) -> Int[Array, " B"]:
        """Return the number of tokens of each row in the first `slots` slots, without padding."""
        counted = (jnp.arange(self.tokens.shape[1])[None] < slots) & (self.segment_ids > 0)
        return jnp.max(jnp.where(counted, self.positions + 1, 0), axis=-1)


@dataclasses.dataclass
class LayerCache:
    """The cache inside layer `layer`: a branch writes to `arrays`. `segment_ids` of all slots have
    the new tokens already, `used` does not count them."""

    arrays: dict[str, Shaped[Array, "L B ..."]]
    segment_ids: Int[Array, "B S"]
    used: Int[Array, ""]
    layer: Int[Array, ""]

    def append(self, name: str, new: Float[Array, "B T ..."]) -> Float[Array, "B S ..."]:
        """Write the new tokens' values to their slots; return all slots of this layer."""
        start = (self.layer, 0, self.used) + (0,) * (new.ndim - 2)
        self.arrays[name] = jax.lax.dynamic_update_slice(self.arrays[name], new[None], start)
        return self.read(name)

    def read(self, name: str) -> Array:
        """Return the array of this layer, without the layers' axis."""
        return self.arrays[name][self.layer]

    def write(self, name: str, value: Array) -> None:
        """Replace the array of this layer."""
        self.arrays[name] = self.arrays[name].at[self.layer].set(value)


LayerTokens = Sequence[Int[Array, "L B k"] | None]
"""For each segment, the places in the row of the tokens that its layers process, ascending; None:
all tokens. An empty sequence: all tokens in all segments."""


class Selection(Protocol):
    """A choice of units inside each layer, from the batch at hand (see `sparsity.dynamic`)."""

    def for_tokens(self, loss_mask: Bool[Array, "B T"]) -> "Selection":
        """Return the choice for a batch whose tokens bear loss as `loss_mask` says."""

    def __call__(self, branch: Any, x: Array, context: "Context") -> tuple[Any, dict[str, Array]]:
        """Return the branch with the kept units alone, and the kept indices by unit."""


@dataclasses.dataclass(frozen=True)
class Context:
    """The inputs of a layer besides the residual stream.

    `segment_ids` int32 `[B, T]` number the documents of a row, 0 is padding. `rotary`: cosines and
    sines float32 `[B, T, rotated / 2]`, None where positions are not rotated. `layer_tokens` are
    those that the layers process. `segment`: which run of layers with equal counts this is. Inside
    a layer, `observed` collects what branches report.
    """

    segment_ids: Int[Array, "B T"]
    rotary: tuple[Array, Array] | None = None
    attention: Implementation | None = None
    retention: RetentionKernel = "xla"
    observe: Collection[Observable] = ()
    selection: Selection | None = None
    key: PRNGKeyArray | None = None
    layer_tokens: LayerTokens = ()
    segment: int = 0
    cache: LayerCache | None = None
    observed: Observed = dataclasses.field(default_factory=dict)

    @property
    def weight_BT(self) -> Float[Array, "B T"]:
        """1 for tokens and 0 for padding."""
        return (self.segment_ids > 0).astype(jnp.float32)

    def report(self, kind: str, unit: str, value: Any) -> None:
        """Add an observation of the branch with this innermost unit."""
        self.observed.setdefault(kind, {})[unit] = value
