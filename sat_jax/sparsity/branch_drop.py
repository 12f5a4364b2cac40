"""Backward passes of whole branches that a step leaves out (DropBP, arXiv:2402.17812).

The forward pass is complete. In a layer without the backward pass of a branch, gradients flow
through the residual stream alone, and the parameters of the branch are not updated.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from sat_jax.sparsity.execution.state import TrainState, map_trees
from sat_jax.sparsity.plan import Plan

_DROP = 2  # the purpose of a random key: what it is folded with after the seed


def draw_backward(plan: Plan, seed: int, step: Int[Array, ""]) -> dict[str, Bool[Array, " L"]]:
    """Return by branch in which layers a step computes its backward pass."""
    if not plan.dropped:
        return {}
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), _DROP), step)
    keys = jax.random.split(key, len(plan.dropped))
    return {
        branch: ~systematic_sample(key, jnp.asarray(rates))
        for key, (branch, rates) in zip(keys, plan.dropped, strict=True)
    }


def systematic_sample(key: PRNGKeyArray, rates: Float[Array, " N"]) -> Bool[Array, " N"]:
    """Return a random subset that contains entry n with probability `rates[n]`.

    Its size is the sum of the rates, rounded up or down, so that steps cost about the same
    (systematic sampling in random order).
    """
    order_key, start_key = jax.random.split(key)
    order = jax.random.permutation(order_key, len(rates))
    # In float32 a sum that is a whole number may be rounded to less: 0.3 + 0.7.
    ends = jnp.round(jnp.cumsum(rates[order]), 5) + jax.random.uniform(start_key)
    counts = jnp.diff(jnp.floor(ends), prepend=0.0)
    return jnp.zeros(len(rates), bool).at[order].set(counts > 0)


def freeze_dropped(
    computed: Mapping[str, Any], after: TrainState, before: TrainState
) -> TrainState:
    """Return the state in which branches without a backward pass are as before the step.

    `computed` are bools by branch as `Execution.split_layers` returns them.
    """

    def keep(new: Mapping[str, Any], old: Mapping[str, Any]) -> dict[str, Any]:
        return {
            path: _where(_computed(path, computed), value, old[path]) for path, value in new.items()
        }

    return map_trees(keep, after, before)


def _computed(path: str, computed: Mapping[str, Any]) -> Any:
    """Return the bools of the branch that has the array; None for other arrays."""
    return next((v for name, v in computed.items() if path.startswith(f"layers/{name}/")), None)


def _where(computed: Any, new: Any, old: Any) -> Any:
    if computed is None:
        return new
    return jax.tree.map(
        lambda c, n, o: jnp.where(jnp.expand_dims(c, range(1, n.ndim)), n, o), computed, new, old
    )
