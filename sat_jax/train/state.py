"""What training changes, whole or compacted."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

from sat_jax.sparsity.masks import Masks
from sat_jax.sparsity.neurons import compact, keep_only
from sat_jax.sparsity.plan import Plan


class TrainState(NamedTuple):
    """Optimizer steps done, float32 parameters by path, and the optimizer's state."""

    step: Int[Array, ""]
    params: dict[str, Array]
    optimizer: Any


def new_state(params: dict[str, Array], optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first step."""
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))


Resting = list[dict[str, Array]]

PARAMS = TrainState._fields.index("params")  # among a state's trees


def compact_state(whole: TrainState, masks: Masks, plan: Plan) -> tuple[TrainState, Resting]:
    """The smaller dense model's state, and what rests: everything keyed by parameter path is parted
    alike (parameters, moments, update counts). `moves` does so without holding both at once."""
    trees, structure = keyed_trees(whole)
    pairs = [compact(t, masks, plan) if isinstance(t, dict) else (t, {}) for t in trees]
    return jax.tree.unflatten(structure, [p[0] for p in pairs]), [p[1] for p in pairs]


def resting_params(resting: Resting) -> dict[str, Array]:
    """Those of the neurons that are not trained."""
    return resting[PARAMS]


def freeze_omitted(new: TrainState, old: TrainState, masks: Masks) -> TrainState:
    """Mask execution with frozen moments: omitted neurons as they were before the step."""
    after, structure = keyed_trees(new)
    before, _ = keyed_trees(old)
    kept = [
        keep_only(a, b, masks) if isinstance(a, dict) else a
        for a, b in zip(after, before, strict=True)
    ]
    return jax.tree.unflatten(structure, kept)


def keyed_trees(state: TrainState) -> tuple[list[Any], Any]:
    """The dictionaries keyed by parameter path, and the lone scalars between them."""
    return jax.tree.flatten(state, is_leaf=lambda node: isinstance(node, dict))
