"""Probes: forward passes of the full model between steps, for statistics of its units."""

from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from sat_jax.data.batch import Batch
from sat_jax.nn.decoder import Decoder
from sat_jax.nn.layout import Layout
from sat_jax.sparsity.importance import METRICS
from sat_jax.sparsity.mask_gradients import mask_gradients
from sat_jax.sparsity.statistics import Observable, Statistics, accumulate, statistics_of
from sat_jax.train.unit_updates import Updates, observe_updates

if TYPE_CHECKING:
    from sat_jax.config_sparsity import SparsityConfig

Probe = Callable[..., Statistics]


class ProbeSettings(NamedTuple):
    """The observed kinds, the decay rate of statistics, the maximum number of tokens, and what
    `updates` are of: the optimizer's changes of parameters for gradients and its own state."""

    observe: tuple[Observable, ...]
    decay: float
    tokens: int
    updates: Callable[[dict[str, Array], Any, dict[str, Array]], Mapping[str, Array]] | None = None


def observed_by_probes(config: "SparsityConfig") -> tuple[Observable, ...]:
    """Return what the metric and the least-squares correction need."""
    needs = METRICS[config.metric].needs
    return (*needs, "products") if config.least_squares_correction else needs


def make_probe(layout: Layout[Decoder], settings: ProbeSettings) -> Probe:
    """Return `probe(params, stats, batch, optimizer)`: the running statistics after a dense pass of
    the full model over some tokens of the batch: the first ones, or with a backward pass those with
    the most tokens that bear loss. `optimizer` is the optimizer's state, which `updates` need."""
    observe, decay, tokens, changes = settings

    def probe(
        params: dict[str, Array], stats: Statistics, batch: Batch, optimizer: Any = None
    ) -> Statistics:
        if {"gradients", "updates"} & set(observe):
            part = with_most_loss(batch, tokens)
        else:
            part = first_tokens(batch, tokens)
        updates = None if changes is None else lambda g: changes(g, optimizer, params)
        return accumulate(stats, observe_batch(layout, params, part, observe, updates), decay)

    return probe


def probe_shape(rows: int, length: int, tokens: int) -> tuple[int, int]:
    """Return the rows and positions that a probe of at most `tokens` tokens sees of a batch: whole
    rows, or a part of one."""
    length = min(length, tokens)
    return min(rows, tokens // length), length


def first_tokens(batch: Batch, tokens: int) -> Batch:
    """Return the part of a batch that a probe of at most `tokens` tokens sees: its first ones."""
    rows, length = probe_shape(*_shape(batch), tokens)
    return jax.tree.map(lambda x: x[:rows, :length], batch)


def _shape(batch: Batch) -> tuple[int, int]:
    rows, length = batch.tokens.shape
    return rows, length


def with_most_loss(batch: Batch, tokens: int) -> Batch:
    """Return the part of a batch that a probe of gradients of at most `tokens` tokens sees: the
    rows, and contiguous positions of them, with the most tokens that bear loss."""
    rows, length = probe_shape(*_shape(batch), tokens)
    _, best = jax.lax.top_k(jnp.sum(batch.loss_mask, axis=1), rows)
    part = jax.tree.map(lambda x: x[jnp.sort(best)], batch)
    sums = jnp.cumsum(jnp.pad(jnp.sum(part.loss_mask, axis=0), (1, 0)))
    start = jnp.argmax(sums[length:] - sums[:-length])
    return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, start, length, axis=1), part)


def observe_batch(
    layout: Layout[Decoder],
    params: Mapping[str, Array],
    batch: Batch,
    observe: Collection[Observable],
    updates: Updates | None = None,
) -> Statistics:
    """Return what is asked for of the full model on a batch: a forward pass, and for `gradients`
    those of the summed loss with respect to a mask of ones on every unit. `updates` are those of
    `observe_updates`, and observed alone."""
    count = jnp.sum(batch.segment_ids > 0).astype(jnp.float32)
    if "updates" in observe:
        assert len(observe) == 1, "metrics of updates need no other observation"
        return Statistics(count, updates=observe_updates(layout, params, batch, updates))
    forward = tuple(kind for kind in observe if kind != "gradients" and kind != "updates")
    if len(forward) == len(observe):
        model, inputs = layout.bind(params), (batch.tokens, batch.segment_ids, batch.positions)
        _, observed = model.hidden(*inputs, observe=forward)
        return statistics_of(count, observed)

    return mask_gradients(layout, params, batch, forward)
