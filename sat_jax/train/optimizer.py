"""Optimizers over parameters by path, with an update count for every neuron.

Between refreshes only kept neurons are updated, and Adam's step count is kept per neuron. With a
global count, a neuron that is first selected late would move by several learning rates at once.
"""

from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from sat_jax.config import OptimizerConfig
from sat_jax.nn.layout import Layout
from sat_jax.sparsity.block_patterns import BlockCounts
from sat_jax.sparsity.execution.state import map_arrays
from sat_jax.sparsity.plan import Stored

Schedule = Callable[[Any], Any]
Clip = Callable[[Array], Array]

_EPSILON = 1e-8


class NeuronAdamState(NamedTuple):
    """Update counts (int32, over the layer and unit axes of each parameter) and both moments."""

    counts: dict[str, Any]
    mu: dict[str, Any]
    nu: dict[str, Any]


def scale_by_neuron_adam(
    beta1: float,
    beta2: float,
    layout: Layout[Any],
    momentum_dtype: str = "float32",
    by_entry: Collection[str] = (),
) -> optax.GradientTransformation:
    """Return Adam (arXiv:1412.6980) with bias correction by the update count of each neuron, or of
    each entry in the parameters `by_entry`."""

    def init(params: Mapping[str, Any]) -> NeuronAdamState:
        def zeros(path: str, array: Array) -> Array:
            axes = array.ndim if path in by_entry else layout.count_axes(path)
            return jnp.zeros(array.shape[:axes], jnp.int32)

        mu = jax.tree.map(lambda x: jnp.zeros_like(x, momentum_dtype), dict(params))
        nu = jax.tree.map(jnp.zeros_like, dict(params))
        return NeuronAdamState(map_arrays(zeros, params), mu, nu)

    def update(
        grads: Mapping[str, Array], state: NeuronAdamState, params: Any = None
    ) -> tuple[dict[str, Array], NeuronAdamState]:
        del params
        grads = dict(grads)
        count = jax.tree.map(lambda n: n + 1, state.counts)
        mu = jax.tree.map(lambda m, g: beta1 * m.astype(g.dtype) + (1 - beta1) * g, state.mu, grads)
        nu = jax.tree.map(lambda v, g: beta2 * v + (1 - beta2) * g * g, state.nu, grads)

        def corrected(n: Array, m: Array, v: Array) -> Array:
            n = n.astype(jnp.float32).reshape(n.shape + (1,) * (m.ndim - n.ndim))
            return (m / (1 - beta1**n)) / (jnp.sqrt(v / (1 - beta2**n)) + _EPSILON)

        updates = jax.tree.map(corrected, count, mu, nu)
        mu = jax.tree.map(lambda m: m.astype(momentum_dtype), mu)
        return updates, NeuronAdamState(count, mu, nu)

    return optax.GradientTransformation(init, update)


def learning_rate(config: OptimizerConfig, steps: int) -> Schedule:
    """Return the learning rate as a function of the step, from 0: linear warm-up to the peak, then
    the schedule, whose value at the last step is `final_scale` times the peak."""
    peak, warmup = config.learning_rate, config.warmup_steps
    peak_step = max(warmup - 1, 0)
    decay_steps = max(steps - 1 - peak_step, 1)
    match config.schedule:
        case "cosine":
            after = optax.cosine_decay_schedule(peak, decay_steps, alpha=config.final_scale)
        case "linear":
            after = optax.linear_schedule(peak, peak * config.final_scale, decay_steps)
        case "constant":
            after = optax.constant_schedule(peak)
        case "wsd":  # warm-up, stable, decay (arXiv:2404.06395)
            length = min(decay_steps, max(1, round(config.decay_share * steps)))
            decay = optax.linear_schedule(peak, peak * config.final_scale, length)
            stable = optax.constant_schedule(peak)
            after = optax.join_schedules([stable, decay], [decay_steps - length])
    if not peak_step:
        return after
    warm_up = optax.linear_schedule(peak / warmup, peak, peak_step)
    return optax.join_schedules([warm_up, after], [peak_step])


def make_optimizer(
    config: OptimizerConfig,
    steps: int,
    layout: Layout[Any],
    by_entry: Collection[str] = (),
    stored: Stored = (),
) -> optax.GradientTransformation:
    """Return the update rule with weight decay of matrices and the learning rate, without clipping.
    Constants have no moments. `by_entry`: parameters whose entries have update counts of their own.

    The learning rate of a matrix in `stored` is divided by its density: an output is a sum over
    fewer inputs, each of which then moves further (arXiv:2405.15743, table 1).

    All operations are elementwise: a compact model gets the same updates of the kept neurons as the
    full model, and parameters can be updated chunk by chunk.
    """
    if config.name == "lion":
        rule = optax.scale_by_lion(config.beta1, config.beta2, config.momentum_dtype)
    else:
        rule = scale_by_neuron_adam(
            config.beta1, config.beta2, layout, config.momentum_dtype, by_entry
        )
    chain = optax.chain(
        rule,
        optax.add_decayed_weights(config.weight_decay, mask=partial(_matrices, layout)),
        optax.scale_by_learning_rate(learning_rate(config, steps)),
        optax.stateless(partial(_scale, _scales(layout, config.matrix_scale, dict(stored)))),
    )

    def init(params: Mapping[str, Any]) -> Any:
        return chain.init({p: x for p, x in params.items() if layout.leaves[p].trained})

    return optax.GradientTransformation(init, chain.update)


def _scales(
    layout: Layout[Any], matrix_scale: float, stored: Mapping[str, BlockCounts]
) -> dict[str, float]:
    """Return the learning rate of each matrix of layers relative to that of other parameters."""
    scales = {}
    for path, leaf in layout.leaves.items():
        if leaf.role in ("read", "write"):
            counts = stored.get(path.removesuffix("/blocks"))
            scales[path] = matrix_scale / (counts.density if counts else 1.0)
    return scales


def _scale(scales: Mapping[str, float], updates: Mapping[str, Any], _: Any) -> dict[str, Any]:
    return {
        path: jax.tree.map(lambda x, scale=scales.get(path, 1.0): scale * x, update)
        for path, update in updates.items()
    }


def clipping(config: OptimizerConfig) -> Clip:
    """Return the factor of the gradients as a function of their global norm, which `clip_norm`
    limits."""
    limit = config.clip_norm
    if limit is None:
        return jnp.ones_like
    return lambda norm: jnp.where(norm <= limit, 1.0, limit / norm)


def parameter_changes(
    optimizer: optax.GradientTransformation,
    clip: Clip,
    grads: Mapping[str, Array],
    state: Any,
    params: Mapping[str, Array],
) -> Mapping[str, Array]:
    """Return what a step with these gradients would add to the parameters, clipping included."""
    factor = clip(optax.tree.norm(grads))
    scaled = {path: factor * grad for path, grad in grads.items()}
    changes: Mapping[str, Array]
    changes, _ = optimizer.update(scaled, state, {path: params[path] for path in grads})
    return changes


def _matrices(layout: Layout[Any], params: Mapping[str, Any]) -> dict[str, bool]:
    """Return whether weight decay applies, by path: not to norm scales and biases."""
    return {path: layout.leaves[path].role != "vector" for path in params}
