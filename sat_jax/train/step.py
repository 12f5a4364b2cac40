"""One optimizer step, one evaluation: pure functions of arrays, to be jitted."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float

from sat_jax.data.batch import Batch
from sat_jax.models.llama import Llama
from sat_jax.models.params import bind, numbered
from sat_jax.sparsity.masks import Masks, selection_key
from sat_jax.sparsity.neurons import in_place_values, mask_values, omitted_values, take_kept
from sat_jax.sparsity.statistics import Observable, Statistics, accumulate
from sat_jax.train.optimizer import Clip, Schedule
from sat_jax.train.state import TrainState, freeze_omitted
from sat_jax.train.update import update, update_in_place


class StepMetrics(NamedTuple):
    """Of one step: mean loss (under masks) a token that bears loss, gradient norm before clipping.

    `tokens` are all that are no padding: what is computed. Of text all of them bear loss. `kept` is
    what the layers of a live model chose.
    """

    loss: Float[Array, ""]
    tokens: Float[Array, ""]
    loss_tokens: Float[Array, ""]
    grad_norm: Float[Array, ""]
    learning_rate: Float[Array, ""]
    kept: Masks = ()


class StepSettings(NamedTuple):
    """What a step is made of besides arrays. `clip` is done to gradients before the optimizer sees
    them. `freeze`: where the state is whole, omitted neurons stay. `seed`: of what a live model
    draws; None: the model is not live. `in_place`: kernel execution; the state is whole, the model
    that of the kept rows, which alone are updated."""

    optimizer: optax.GradientTransformation
    clip: Clip
    schedule: Schedule
    microbatches: int
    observe: tuple[Observable, ...]
    stats_decay: float
    freeze: bool
    seed: int | None = None
    in_place: bool = False


def make_step(
    graph: nnx.GraphDef[Llama], settings: StepSettings
) -> Callable[..., tuple[TrainState, Statistics, StepMetrics]]:
    """`step(state, stats, masks, batch, resting)`: the state, running statistics and metrics after
    one update. `masks` is empty for a compacted, whole or live model, and given in mask and kernel
    execution. `resting`: of a compacted model whose forward pass has all neurons the parameters
    that are not in the state. `offsets`: what `compensation` says."""

    def step(
        state: TrainState,
        stats: Statistics,
        masks: Masks,
        batch: Batch,
        resting: Mapping[str, Array] = MappingProxyType({}),
        offsets: Mapping[str, Array] = MappingProxyType({}),
    ) -> tuple[TrainState, Statistics, StepMetrics]:
        seed = settings.seed
        key = None if seed is None else selection_key(seed, state.step)

        params, told = state.params, mask_values(masks) | omitted_values(state.params, resting)
        told |= offsets
        if settings.in_place:
            params, told = take_kept(params, masks), in_place_values(params, masks)

        def loss(params: dict[str, Array], part: Batch) -> tuple[Array, Statistics]:
            model = bind(graph, params | told)
            return model.loss(*part, observe=settings.observe, key=key)

        total, seen, grads = _over_microbatches(
            jax.value_and_grad(loss, has_aux=True), params, batch, settings.microbatches
        )
        loss_tokens = jnp.sum(batch.loss_mask).astype(jnp.float32)
        learnt = jnp.maximum(loss_tokens, 1)  # no answer, no loss
        norm = optax.tree.norm(grads) / learnt
        factor = settings.clip(norm) / learnt
        chosen = seen.kept or ()
        frozen = masks or chosen
        if settings.in_place:
            after = update_in_place(settings.optimizer, grads, factor, state, masks)
        else:
            after = update(settings.optimizer, grads, factor, state)
        if settings.freeze and frozen and not settings.in_place:
            after = freeze_omitted(after, state, frozen)
        if settings.observe:
            stats = accumulate(stats, seen, settings.stats_decay)
        metrics = StepMetrics(
            loss=total / learnt,
            tokens=jnp.sum(batch.segment_ids > 0).astype(jnp.float32),
            loss_tokens=loss_tokens,
            grad_norm=norm,
            learning_rate=jnp.asarray(settings.schedule(state.step), jnp.float32),
            kept=chosen,
        )
        return after, stats, metrics

    return step


def _over_microbatches(
    value_and_grad: Callable[..., Any], params: dict[str, Array], batch: Batch, parts: int
) -> tuple[Array, Statistics, dict[str, Array]]:
    """Sums of loss, observations and gradients over `parts` microbatches, one at a time."""
    if parts == 1:
        (total, seen), grads = value_and_grad(params, batch)
        return total, seen, grads

    # Row i of the step goes to microbatch i mod parts, so that each device keeps its own rows.
    def split(rows: Array) -> Array:
        return rows.reshape(-1, parts, *rows.shape[1:]).swapaxes(0, 1)

    def add(sums: Any, part: Batch) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, sums, value_and_grad(params, part)), None

    microbatches = jax.tree.map(split, batch)
    first = jax.tree.map(lambda x: x[0], microbatches)
    zeros = jax.tree.map(
        lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(value_and_grad, params, first)
    )
    ((total, seen), grads), _ = jax.lax.scan(add, zeros, microbatches)
    return total, seen, grads


def make_evaluation(
    graph: nnx.GraphDef[Llama],
) -> Callable[[dict[str, Array], Batch], tuple[Array, Array]]:
    """`evaluate(params, batch)`: sum of the whole model's losses, and of how many tokens."""

    def evaluate(params: dict[str, Array], batch: Batch) -> tuple[Array, Array]:
        total, _ = bind(graph, numbered(params)).loss(*batch)
        return total, jnp.sum(batch.loss_mask)

    return evaluate
