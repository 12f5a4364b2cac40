"""One optimizer step, one evaluation: pure functions of arrays, to be jitted."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from sat_jax.data.batch import Batch
from sat_jax.nn.branch import set_backward
from sat_jax.nn.decoder import Decoder
from sat_jax.nn.distillation import Distillation, distillation_loss
from sat_jax.nn.layout import Layout
from sat_jax.nn.loss import next_token_loss
from sat_jax.nn.top_tokens import TopTokens
from sat_jax.sparsity.branch_drop import draw_backward, freeze_dropped
from sat_jax.sparsity.choose import selection_key
from sat_jax.sparsity.correction import Corrections
from sat_jax.sparsity.execution.base import Execution
from sat_jax.sparsity.execution.state import TrainState, Tree
from sat_jax.sparsity.rows import Kept
from sat_jax.sparsity.statistics import Observable, Statistics, accumulate, statistics_of
from sat_jax.sparsity.token_sampling import sample_tokens, token_key
from sat_jax.sparsity.token_skipping import draw_tokens
from sat_jax.train.optimizer import Clip, Schedule

_NOTHING: Mapping[str, Any] = MappingProxyType({})


class StepMetrics(NamedTuple):
    """Metrics of one step: mean loss (under masks) per token that bears loss, gradient norm before
    clipping.

    `tokens` are all that are no padding: what is computed. Of text all of them bear loss. `kept` is
    what a dynamic selection kept. `parts` are the means of which distillation makes the loss.
    """

    loss: Float[Array, ""]
    tokens: Float[Array, ""]
    loss_tokens: Float[Array, ""]
    grad_norm: Float[Array, ""]
    learning_rate: Float[Array, ""]
    kept: Kept = ()
    parts: Mapping[str, Float[Array, ""]] = {}


class StepSettings(NamedTuple):
    """What a step is made of besides arrays and its execution. `clip` is applied to gradients
    before the optimizer; `seed` is that of random choices inside a step."""

    optimizer: optax.GradientTransformation
    clip: Clip
    schedule: Schedule
    microbatches: int = 1
    observe: tuple[Observable, ...] = ()
    stats_decay: float = 0.0
    seed: int = 0
    distillation: Distillation | None = None


def make_step(
    execution: Execution, settings: StepSettings
) -> Callable[..., tuple[TrainState, Statistics, StepMetrics]]:
    """Return `step(state, stats, kept, batch, omitted, corrections, teacher)`: the state, the
    running statistics and the metrics after one update. The state is the one that the execution's
    `compact` returned for `kept`; `omitted` are the parameters that it left out. `teacher` are the
    parameters of the teacher, with distillation, or its `TopTokens` for the batch."""

    plan = execution.plan

    def step(
        state: TrainState,
        stats: Statistics,
        kept: Kept,
        batch: Batch,
        omitted: Tree = _NOTHING,
        corrections: Corrections = _NOTHING,
        teacher: Tree | TopTokens = _NOTHING,
    ) -> tuple[TrainState, Statistics, StepMetrics]:
        stored = teacher if isinstance(teacher, TopTokens) else None
        teacher_params = _NOTHING if isinstance(teacher, TopTokens) else teacher
        options: dict[str, Any] = {"observe": settings.observe}
        selection = execution.selection
        if selection is not None:
            # One microbatch has all rows (`config_checks`).
            options["selection"] = selection.for_tokens(batch.loss_mask)
            options["key"] = selection_key(settings.seed, state.step)

        computed = {
            branch: execution.split_layers(layers)
            for branch, layers in draw_backward(plan, settings.seed, state.step).items()
        }

        def loss(
            trained: Tree, data: tuple[Batch, TopTokens | None]
        ) -> tuple[Array, tuple[Any, ...]]:
            part, top = data
            model = execution.bind(trained, state.params, omitted, kept, corrections)
            set_backward(model.layers, computed)
            if plan.token_rate > 0:
                key = token_key(settings.seed, state.step)
                sample_tokens(model.layers, plan.token_rate, key)
            tokens = draw_tokens(plan, settings.seed, state.step, part.segment_ids)
            parts: Mapping[str, Array] = {}
            if settings.distillation is None:
                total, observed = next_token_loss(model, *part, layer_tokens=tokens, **options)
            else:
                layout, how = settings.distillation
                known = layout.bind(teacher_params) if top is None else top
                total, parts, observed = distillation_loss(
                    model, known, how, *part, layer_tokens=tokens, **options
                )
            chosen: Kept = ()
            if selection is not None:
                chosen = tuple(segment.get("kept", {}) for segment in observed)
            return total, (statistics_of(_count_tokens(part), observed), chosen, parts)

        trained = execution.trained(state.params, kept)
        value_and_grad = jax.value_and_grad(loss, has_aux=True)
        (total, (seen, chosen, parts)), grads = _over_microbatches(
            value_and_grad, trained, (batch, stored), settings.microbatches
        )
        loss_tokens = jnp.sum(batch.loss_mask).astype(jnp.float32)
        divisor = jnp.maximum(loss_tokens, 1)  # a batch may have no token that bears loss
        norm = optax.tree.norm(grads) / divisor
        factor = settings.clip(norm) / divisor
        after = execution.update(settings.optimizer, grads, factor, state, chosen or kept)
        if computed:
            after = freeze_dropped(computed, after, state)
        if settings.observe:
            stats = accumulate(stats, seen, settings.stats_decay)
        metrics = StepMetrics(
            loss=total / divisor,
            tokens=_count_tokens(batch),
            loss_tokens=loss_tokens,
            grad_norm=norm,
            learning_rate=jnp.asarray(settings.schedule(state.step), jnp.float32),
            kept=chosen,
            parts=jax.tree.map(lambda part: part / divisor, parts),
        )
        return after, stats, metrics

    return step


def make_evaluation(
    layout: Layout[Decoder],
) -> Callable[[dict[str, Array], Batch], tuple[Array, Array]]:
    """Return `evaluate(params, batch)`: the sum of the full model's losses, and of how many
    tokens."""

    def evaluate(params: dict[str, Array], batch: Batch) -> tuple[Array, Array]:
        total, _ = next_token_loss(layout.bind(params), *batch)
        return total, jnp.sum(batch.loss_mask)

    return evaluate


def _count_tokens(batch: Batch) -> Float[Array, ""]:
    return jnp.sum(batch.segment_ids > 0).astype(jnp.float32)


def _over_microbatches(
    value_and_grad: Callable[..., Any], trained: Tree, batch: Any, parts: int
) -> Any:
    """Return the sums of values, observations and gradients over `parts` microbatches, one at a
    time."""
    if parts == 1:
        return value_and_grad(trained, batch)

    # Row i of the step goes to microbatch i mod parts, so that each device keeps its own rows.
    def split(rows: Array) -> Array:
        return rows.reshape(-1, parts, *rows.shape[1:]).swapaxes(0, 1)

    def add(sums: Any, part: Any) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, sums, value_and_grad(trained, part)), None

    microbatches = jax.tree.map(split, batch)
    first = jax.tree.map(lambda x: x[0], microbatches)
    zeros = jax.tree.map(
        lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(value_and_grad, trained, first)
    )
    sums, _ = jax.lax.scan(add, zeros, microbatches)
    return sums
