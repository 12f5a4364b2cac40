"""A look at the whole model between steps: what its neurons output, and what they are worth."""

from collections.abc import Callable, Collection
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Int, PRNGKeyArray

from sat_jax.data.batch import Batch
from sat_jax.models.llama import Llama
from sat_jax.models.params import bind, numbered
from sat_jax.sparsity.statistics import Gates, Observable, Statistics, accumulate

Probe = Callable[[dict[str, Array], Statistics, Batch, Int[Array, ""]], Statistics]
Sampling = Literal["first", "random"]

_PROBE = 2  # the purpose of a random key: what it is folded with after the seed


class ProbeSettings(NamedTuple):
    """What a probe observes, how older observations weigh, and which tokens it sees: at most
    `tokens`, as `probed` counts them, from `sampling`."""

    observe: tuple[Observable, ...]
    decay: float
    tokens: int
    sampling: Sampling = "first"
    seed: int = 0


def make_probe(graph: nnx.GraphDef[Llama], settings: ProbeSettings) -> Probe:
    """`probe(params, stats, batch, step)`: running statistics after a dense forward pass of the
    whole model over some tokens of the batch. Where `gradients` are observed, a backward pass to
    the neurons' outputs follows."""
    observe, decay, tokens, sampling, seed = settings

    def probe(
        params: dict[str, Array], stats: Statistics, batch: Batch, step: Int[Array, ""]
    ) -> Statistics:
        rows, length = probed(batch.tokens.shape[0], batch.tokens.shape[1], tokens)
        if sampling == "random":
            key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), _PROBE), step)
            part = _windows(batch, rows, length, key)
        else:
            part = jax.tree.map(lambda x: x[:rows, :length], batch)
        return accumulate(stats, observed(bind(graph, numbered(params)), part, observe), decay)

    return probe


def probed(rows: int, length: int, tokens: int) -> tuple[int, int]:
    """Rows and positions that a probe of at most `tokens` tokens sees of a batch: whole rows, or a
    part of one."""
    length = min(length, tokens)
    return min(rows, tokens // length), length


def _windows(batch: Batch, rows: int, length: int, key: PRNGKeyArray) -> Batch:
    """`rows` different rows, and of each `length` positions from a random one on."""
    row_key, start_key = jax.random.split(key)
    total, width = batch.tokens.shape
    chosen = jax.random.permutation(row_key, total)[:rows]
    start = jax.random.randint(start_key, (rows, 1), 0, width - length + 1)
    columns = start + jnp.arange(length)[None]
    return jax.tree.map(lambda x: x[chosen[:, None], columns], batch)


def observed(model: Llama, batch: Batch, observe: Collection[Observable]) -> Statistics:
    """What is asked for, of a whole model on a batch: a forward pass, and for `gradients` those of
    the summed loss with respect to a unit gate on every neuron."""
    forward = tuple(kind for kind in observe if kind != "gradients")
    if len(forward) == len(observe):
        return model.hidden(batch.tokens, batch.segment_ids, batch.positions, forward)[1]
    config = model.config
    gates = Gates(
        jnp.ones((config.n_layers, config.n_kv_heads, config.query_heads)),
        jnp.ones((config.n_layers, config.d_ff)),
    )

    def loss(gates: Gates) -> tuple[Array, Statistics]:
        return model.loss(*batch, observe=forward, gates=gates)

    gradients, seen = jax.grad(loss, has_aux=True)(gates)
    return seen._replace(gradients=gradients)
