"""Optimizers over parameters keyed by path, with an update count for every neuron.

Between refreshes only the kept neurons are trained, each therefore on its own clock: Adam's bias
correction counts a neuron's own updates. With one global count, a neuron first chosen late would
move several learning rates at once.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from sat_jax.config import OptimizerConfig
from sat_jax.sparsity.neurons import neuron_axes

Schedule = Callable[[Any], Any]
Clip = Callable[[Array], Array]

_EPSILON = 1e-8
_VECTORS = ("norm", "bias")


class NeuronAdamState(NamedTuple):
    """Update counts int32 over the neuron axes of each parameter, and both moments."""

    counts: dict[str, Array]
    mu: dict[str, Array]
    nu: dict[str, Array]


def scale_by_neuron_adam(
    beta1: float, beta2: float, momentum_dtype: str = "float32"
) -> optax.GradientTransformation:
    """Adam (arXiv:1412.6980) whose bias correction counts each neuron's own updates."""

    def init(params: Mapping[str, Array]) -> NeuronAdamState:
        counts = {p: jnp.zeros(x.shape[: neuron_axes(p)], jnp.int32) for p, x in params.items()}
        mu = {p: jnp.zeros_like(x, momentum_dtype) for p, x in params.items()}
        return NeuronAdamState(counts, mu, jax.tree.map(jnp.zeros_like, dict(params)))

    def update(
        grads: Mapping[str, Array], state: NeuronAdamState, params: Any = None
    ) -> tuple[dict[str, Array], NeuronAdamState]:
        del params
        count = {path: n + 1 for path, n in state.counts.items()}
        mu = {p: beta1 * state.mu[p].astype(g.dtype) + (1 - beta1) * g for p, g in grads.items()}
        nu = {p: beta2 * state.nu[p] + (1 - beta2) * g * g for p, g in grads.items()}
        updates = {}
        for path, n in count.items():
            n = n.astype(jnp.float32).reshape(n.shape + (1,) * (mu[path].ndim - n.ndim))
            mean = mu[path] / (1 - beta1**n)
            square = nu[path] / (1 - beta2**n)
            updates[path] = mean / (jnp.sqrt(square) + _EPSILON)
        mu = {p: m.astype(momentum_dtype) for p, m in mu.items()}
        return updates, NeuronAdamState(count, mu, nu)

    return optax.GradientTransformation(init, update)


def learning_rate(config: OptimizerConfig, steps: int) -> Schedule:
    """Step (from 0) → learning rate: linear warm-up to the peak, then the schedule down to the last
    step, which trains at `final_scale` of the peak unless it is the peak itself."""
    peak, warmup = config.learning_rate, config.warmup_steps
    top = max(warmup - 1, 0)  # the step at the peak
    rest = max(steps - 1 - top, 1)
    match config.schedule:
        case "cosine":
            after = optax.cosine_decay_schedule(peak, rest, alpha=config.final_scale)
        case "linear":
            after = optax.linear_schedule(peak, peak * config.final_scale, rest)
        case "constant":
            after = optax.constant_schedule(peak)
        case "wsd":  # warm-up, stable, decay (arXiv:2404.06395)
            falling = min(rest, max(1, round(config.decay_share * steps)))
            fall = optax.linear_schedule(peak, peak * config.final_scale, falling)
            after = optax.join_schedules([optax.constant_schedule(peak), fall], [rest - falling])
    if not top:
        return after
    ramp = optax.linear_schedule(peak / warmup, peak, top)
    return optax.join_schedules([ramp, after], [top])


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """Scale by the rule, decay matrices, scale by the learning rate; clipping comes before.

    All of it is elementwise: training the compacted model updates the kept neurons exactly as
    training the whole one would, and parameters can be updated one part after the other.
    """
    if config.name == "lion":
        rule = optax.scale_by_lion(config.beta1, config.beta2, config.momentum_dtype)
    elif config.bias_correction == "neuron":
        rule = scale_by_neuron_adam(config.beta1, config.beta2, config.momentum_dtype)
    else:
        rule = optax.scale_by_adam(
            config.beta1, config.beta2, _EPSILON, mu_dtype=config.momentum_dtype
        )
    return optax.chain(
        rule,
        optax.add_decayed_weights(config.weight_decay, mask=_matrices),
        optax.scale_by_learning_rate(learning_rate(config, steps)),
    )


def clipping(config: OptimizerConfig) -> Clip:
    """Global norm of the gradients → what they are multiplied by, so that it is not above
    `clip_norm`."""
    limit = config.clip_norm
    if limit is None:
        return jnp.ones_like
    return lambda norm: jnp.where(norm <= limit, 1.0, limit / norm)


def _matrices(params: Mapping[str, Array]) -> dict[str, bool]:
    return {path: not path.endswith(_VECTORS) for path in params}
