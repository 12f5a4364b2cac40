"""What is observed of a forward pass, and how it is averaged over steps."""

from typing import TYPE_CHECKING, Literal, NamedTuple

import jax
from jaxtyping import Array, Float

if TYPE_CHECKING:
    from sat_jax.sparsity.masks import Masks

Observable = Literal["inputs", "outputs", "predicted", "gradients", "products"]


class InputSums(NamedTuple):
    """Sums over tokens of a module's normed input x: `square` Σx², `linear` Σx, both `[L, D]`."""

    square: Float[Array, "L D"]
    linear: Float[Array, "L D"]


class Gates(NamedTuple):
    """A factor for every neuron's output: of query heads `[L, K, G]`, of channels `[L, F]`."""

    heads: Float[Array, "L K G"]
    channels: Float[Array, "L F"]


class Products(NamedTuple):
    """Σ over tokens of a_i · a_j, for every pair of a layer's columns: of the heads' value mixes
    (K · G · E of them), and of the channels' activations."""

    heads: Float[Array, "L C C"]
    channels: Float[Array, "L F F"]


class Statistics(NamedTuple):
    """Token-weighted float32 sums over `count` non-padding tokens; None where not observed.

    `attention` and `mlp` are the modules' inputs. `heads` `[L, K, G, G]` holds, for each KV group,
    Σ⟨o_g W_o,g , o_h W_o,h⟩ of every pair of its query heads; `channels` `[L, F]` is Σa² of each
    channel's activation: of the real outputs, or of those that weights of low rank predict
    (`predicted`). `gradients` is Σ⟨a, ∂L/∂a⟩ of each neuron's output a: the gradient of the
    loss L with respect to a unit gate on it. `products` are those of the outputs' columns. `kept`
    is no sum: what the layers of a live model chose to keep for this batch.
    """

    count: Float[Array, ""]  # type: ignore[assignment]  # hides the method of tuples
    attention: InputSums | None = None
    mlp: InputSums | None = None
    heads: Float[Array, "L K G G"] | None = None
    channels: Float[Array, "L F"] | None = None
    gradients: Gates | None = None
    products: Products | None = None
    kept: "Masks | None" = None


def accumulate(running: Statistics, new: Statistics, decay: float) -> Statistics:
    """`decay · running + new`. Sums and count decay together, so that any ratio of the two is the
    token-weighted average over the steps, newest heaviest. Both observe the same, since they have
    one count: otherwise jax raises a `ValueError`."""
    return jax.tree.map(lambda old, fresh: decay * old + fresh, running, new)
