"""Statistics and weights → one score a neuron.

A metric is a function of a few lines over one module's `Evidence`, and one entry in `METRICS`. One
that scores columns takes the sum over a neuron's columns and matrices. Sources: Wanda
(arXiv:2306.11695) for `wanda`, the SAT paper (arXiv:2406.01392) for the choice of `uniform`,
`magnitude`, `wanda` and `maxip`; `output` measures what a neuron adds to the residual stream, `svd`
predicts it (after SparseLoRA, arXiv:2506.16500), `taylor` is what a neuron's absence would cost to
first order (Molchanov et al., arXiv:1611.06440).
"""

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from sat_jax.sparsity.plan import AttentionUnit
from sat_jax.sparsity.statistics import InputSums, Observable, Statistics

Scores = Float[Array, "L N"]


class Evidence(NamedTuple):
    """What a metric may look at: N neurons a layer, each of C columns of width D.

    `reads` and `writes` are the matrices `[L, N, C, D]` that take from and add to the residual
    stream; `rms` and `mean` `[L, D]` describe the module's input over tokens; `energy` `[L, N]` is
    the mean square norm of what each neuron added, `gradient` `[L, N]` the mean over tokens of
    ⟨a, ∂L/∂a⟩ of its output a. None where not observed.
    """

    reads: tuple[Float[Array, "L N C D"], ...]
    writes: tuple[Float[Array, "L N C D"], ...]
    rms: Float[Array, "L D"] | None
    mean: Float[Array, "L D"] | None
    energy: Scores | None
    gradient: Scores | None
    key: PRNGKeyArray


class Metric(NamedTuple):
    """A score, and what must be observed for it."""

    score: Callable[[Evidence], Scores]
    needs: tuple[Observable, ...] = ()

    @property
    def probes(self) -> bool:
        """Whether every refresh needs a probe: inputs alone are seen with every step."""
        return not set(self.needs) <= {"inputs"}

    @property
    def foresees(self) -> bool:
        """Whether a module's input tells all that is needed, before its neurons have run."""
        return set(self.needs) <= {"inputs", "predicted"}


def total(columns: Iterable[Float[Array, "L N C"]]) -> Scores:
    """Scores of neurons: sums of those of their columns, `[L, N, C]` for each matrix."""
    return jnp.stack([c.sum(-1) for c in columns], axis=-1).sum(-1)


def uniform(e: Evidence) -> Scores:
    """Random, new at every draw."""
    return jax.random.uniform(e.key, e.reads[0].shape[:2])


def magnitude(e: Evidence) -> Scores:
    """‖W_:j‖₂, over all matrices."""
    return total(jnp.linalg.norm(w, axis=-1) for w in e.reads + e.writes)


def wanda(e: Evidence) -> Scores:
    """Σ_i |W_ij| · rms(x_i)."""
    return total(jnp.einsum("LNCD,LD->LNC", jnp.abs(w), e.rms) for w in e.reads)


def maxip(e: Evidence) -> Scores:
    """|Σ_i W_ij · mean(x_i)|."""
    return total(jnp.abs(jnp.einsum("LNCD,LD->LNC", w, e.mean)) for w in e.reads)


def output(e: Evidence) -> Scores:
    """‖a_j‖₂ · ‖W_out,j‖₂ of a channel, ‖o_h W_o,h‖₂ of a head or group: an rms over tokens.

    `svd` is the same of outputs predicted by weights of low rank (see `models.low_rank`).
    """
    assert e.energy is not None
    return jnp.sqrt(e.energy)


def taylor(e: Evidence) -> Scores:
    """|Σ ⟨a_j, ∂L/∂a_j⟩|: how much the loss changes, to first order, where the neuron is gone."""
    assert e.gradient is not None
    return jnp.abs(e.gradient)


METRICS: Mapping[str, Metric] = {
    "uniform": Metric(uniform),
    "magnitude": Metric(magnitude),
    "wanda": Metric(wanda, needs=("inputs",)),
    "maxip": Metric(maxip, needs=("inputs",)),
    "output": Metric(output, needs=("outputs",)),
    "svd": Metric(output, needs=("predicted",)),
    "taylor": Metric(taylor, needs=("gradients",)),
}


def head_evidence(
    params: Mapping[str, Array],
    stats: Statistics,
    unit: AttentionUnit,
    key: PRNGKeyArray,
) -> Evidence:
    """KV groups `[L, K]`, or query heads `[L, K · G]`, of a whole model.

    A query head is judged by its query and output matrices, a group by its key and value too.
    """
    query, output = (params[f"layers/attention/{name}"] for name in ("query", "output"))
    layers, groups, heads, size, width = query.shape
    n, c = (groups, heads * size) if unit == "kv_group" else (groups * heads, size)
    reads = [query.reshape(layers, n, c, width)]
    if unit == "kv_group":
        reads += [params["layers/attention/key"], params["layers/attention/value"]]
    energy = gradient = None
    if stats.heads is not None:
        diagonal = jnp.diagonal(stats.heads, axis1=-2, axis2=-1).reshape(layers, -1)
        energy = stats.heads.sum((-2, -1)) if unit == "kv_group" else diagonal
    if stats.gradients is not None:
        gradient = stats.gradients.heads.reshape(layers, n, -1).sum(-1)
    writes = (output.reshape(layers, n, c, width),)
    weights = (tuple(reads), writes)
    return _evidence(*weights, stats.attention, energy, gradient, stats.count, key)


def channel_evidence(
    params: Mapping[str, Array],
    stats: Statistics,
    key: PRNGKeyArray,
) -> Evidence:
    """Channels `[L, F]` of a whole model."""
    gate, up, down = (params[f"layers/mlp/{name}"][:, :, None] for name in ("gate", "up", "down"))
    energy = None
    if stats.channels is not None:
        energy = stats.channels * jnp.square(down).sum((-2, -1))
    gradient = None if stats.gradients is None else stats.gradients.channels
    weights = ((gate, up), (down,))
    return _evidence(*weights, stats.mlp, energy, gradient, stats.count, key)


def _evidence(
    reads: tuple[Array, ...],
    writes: tuple[Array, ...],
    inputs: InputSums | None,
    energy: Array | None,
    gradient: Array | None,
    count: Array,
    key: PRNGKeyArray,
) -> Evidence:
    rms = mean = None
    if inputs is not None:
        rms, mean = jnp.sqrt(inputs.square / count), inputs.linear / count
    # Rounding can leave the energy of a head that adds nothing a little below zero.
    energy = None if energy is None else jnp.maximum(energy, 0) / count
    gradient = None if gradient is None else gradient / count
    return Evidence(reads, writes, rms, mean, energy, gradient, key)
