"""Forward passes of the full model between steps, which observe what its units output."""

from collections.abc import Callable, Collection, Mapping
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, PRNGKeyArray

from sat_jax.data.batch import Batch
from sat_jax.nn.decoder import Decoder
from sat_jax.nn.layout import Layout
from sat_jax.nn.loss import next_token_loss
from sat_jax.sparsity.statistics import Observable, Statistics, accumulate, statistics_of

Probe = Callable[[dict[str, Array], Statistics, Batch, Int[Array, ""]], Statistics]
Sampling = Literal["first", "random"]

_PROBE = 2  # the purpose of a random key: what it is folded with after the seed


class ProbeSettings(NamedTuple):
    """What a probe observes, the weight of older observations, and which tokens it sees: at most
    `tokens`, as `probe_shape` counts them, from `sampling`."""

    observe: tuple[Observable, ...]
    decay: float
    tokens: int
    sampling: Sampling = "first"
    seed: int = 0


def make_probe(layout: Layout[Decoder], settings: ProbeSettings) -> Probe:
    """Return `probe(params, stats, batch, step)`: the running statistics after a dense forward pass
    of the full model over some tokens of the batch."""
    observe, decay, tokens, sampling, seed = settings

    def probe(
        params: dict[str, Array], stats: Statistics, batch: Batch, step: Int[Array, ""]
    ) -> Statistics:
        rows, length = probe_shape(batch.tokens.shape[0], batch.tokens.shape[1], tokens)
        if sampling == "random":
            key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), _PROBE), step)
            part = _windows(batch, rows, length, key)
        else:
            part = jax.tree.map(lambda x: x[:rows, :length], batch)
        return accumulate(stats, observe_batch(layout, params, part, observe), decay)

    return probe


def probe_shape(rows: int, length: int, tokens: int) -> tuple[int, int]:
    """Return the rows and positions that a probe of at most `tokens` tokens sees of a batch: whole
    rows, or a part of one."""
    length = min(length, tokens)
    return min(rows, tokens // length), length


def observe_batch(
    layout: Layout[Decoder],
    params: Mapping[str, Array],
    batch: Batch,
    observe: Collection[Observable],
) -> Statistics:
    """Return what is asked for of the full model on a batch: a forward pass, and for `gradients`
    those of the summed loss with respect to a mask of ones on every unit."""
    forward = tuple(kind for kind in observe if kind != "gradients")
    count = jnp.sum(batch.segment_ids > 0).astype(jnp.float32)
    if len(forward) == len(observe):
        model, inputs = layout.bind(params), (batch.tokens, batch.segment_ids, batch.positions)
        _, observed = model.hidden(*inputs, observe=forward)
        return statistics_of(count, observed)

    def loss(masks: dict[str, Array]) -> tuple[Array, Statistics]:
        model = layout.bind(params, masks)
        total, observed = next_token_loss(model, *batch, observe=forward)
        return total, statistics_of(count, observed)

    gradients, seen = jax.grad(loss, has_aux=True)(_ones(layout))
    return seen._replace(gradients=gradients)


def _ones(layout: Layout[Decoder]) -> dict[str, Array]:
    """Return a mask of ones `[L, *units]` for the innermost units of every branch."""
    masks = {}
    for branch in layout.branches.values():
        sizes = [layout.units[unit].size for unit in branch.units]
        masks[branch.units[-1]] = jnp.ones((layout.layers, *sizes))
    return masks


def _windows(batch: Batch, rows: int, length: int, key: PRNGKeyArray) -> Batch:
    """Return `rows` different rows, and of each `length` positions from a random one on."""
    row_key, start_key = jax.random.split(key)
    total, width = batch.tokens.shape
    chosen = jax.random.permutation(row_key, total)[:rows]
    start = jax.random.randint(start_key, (rows, 1), 0, width - length + 1)
    columns = start + jnp.arange(length)[None]
    return jax.tree.map(lambda x: x[chosen[:, None], columns], batch)
