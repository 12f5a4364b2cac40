"""What is observed of a forward pass, and how it is averaged over steps."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sat_jax.nn.context import Observed
from sat_jax.nn.observe import InputSums

Observable = Literal["inputs", "outputs", "predicted", "norms", "gradients", "products", "updates"]
"""What metrics may need: `predicted` are outputs predicted with weights of low rank, `norms` sums
of squares of predicted products and activations, `gradients` those of a mask of ones on every unit,
`updates` sums over the parameters of each unit."""


class UpdateSums(NamedTuple):
    """Sums over the parameters of each unit, of the gradient g of the mean loss, multiplied by the
    number of tokens: `absolute` Σ|g|, `square` Σg², and `gain` -Σg · Δ, with the change Δ that the
    optimizer would make. Each `[L, *within, units]`, or `[L, N]` in `ScoreInputs`."""

    absolute: Array
    square: Array
    gain: Array


class Statistics(NamedTuple):
    """Token-weighted float32 sums over `count` non-padding tokens, by innermost unit of a branch.

    `inputs` are of the branch's input. `outputs` are what its units add to the residual stream, as
    `nn.observe.output_energy` describes it. `gradients` `[L, *units]` is Σ⟨a, ∂L/∂a⟩ of each unit's
    activation a. `norms` are those of `Branch.predicted_squares`. `products` `[L, C, C]` is Σ a_i ·
    a_j of every pair of columns. `updates` are by the name of any unit, not of innermost ones
    alone. Empty where not observed.
    """

    count: Float[Array, ""]  # type: ignore[assignment]  # hides the method of tuples
    inputs: Mapping[str, InputSums] = {}
    outputs: Mapping[str, Array] = {}
    norms: Mapping[str, Mapping[str, Array]] = {}
    gradients: Mapping[str, Array] = {}
    products: Mapping[str, Array] = {}
    updates: Mapping[str, UpdateSums] = {}


def statistics_of(count: Array, observed: Sequence[Observed]) -> Statistics:
    """Return the statistics of all layers from what each segment's layers observed."""
    kinds: list[dict[str, Any]] = [
        {kind: values for kind, values in part.items() if kind != "kept"} for part in observed
    ]
    joined = jax.tree.map(lambda *parts: jnp.concatenate(parts), *kinds)
    return Statistics(count, **joined)


def accumulate(running: Statistics, new: Statistics, decay: float) -> Statistics:
    """Return `decay · running + new`. Sums and count decay together, so that any ratio of the two
    is the token-weighted average over the steps, newest heaviest. Both must observe the same, since
    they have one count: otherwise jax raises a `ValueError`."""
    return jax.tree.map(lambda old, fresh: decay * old + fresh, running, new)
