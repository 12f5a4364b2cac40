"""Statistics and weights → one score a unit.

A metric is a function of a few lines over one unit's `ScoreInputs`, and one entry in `METRICS`.
Sources: Wanda (arXiv:2306.11695) for `wanda`, the SAT paper (arXiv:2406.01392) for the choice of
`uniform`, `magnitude`, `wanda` and `maxip`; `output` measures what a unit adds to the residual
stream, `svd` predicts it (after SparseLoRA, arXiv:2506.16500), `sparselora` has the norms of that
paper, `taylor` is what a unit's absence would cost to first order (Molchanov et al.,
arXiv:1611.06440). `gradient_l1`, `gradient_l2` and `update_gain` measure what the update of a unit
is worth, where the forward pass has all units.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from sat_jax.nn.layout import Layout
from sat_jax.nn.param import EMBED
from sat_jax.sparsity.statistics import Observable, Statistics, UpdateSums

Scores = Float[Array, "L N"]


class ScoreInputs(NamedTuple):
    """What a metric may use: N units a layer, each of C columns of width D.

    `reads` and `writes` are the matrices `[L, N, C, D]` that read from and write to the residual
    stream; `rms` and `mean` `[L, D]` describe the branch's input over tokens; `energy` `[L, N]` is
    the mean square norm of what each unit added, `norm` `[L, N]` that of `_norms`, `gradient`
    `[L, N]` the mean over tokens of ⟨a, ∂L/∂a⟩ of its activation a; `update` has sums over the
    unit's parameters, `[L, N]`. None where not observed.
    """

    reads: tuple[Float[Array, "L N C D"], ...]
    writes: tuple[Float[Array, "L N C D"], ...]
    rms: Float[Array, "L D"] | None
    mean: Float[Array, "L D"] | None
    energy: Scores | None
    norm: Scores | None
    gradient: Scores | None
    update: UpdateSums | None
    key: PRNGKeyArray


class Metric(NamedTuple):
    """A score, and what must be observed for it."""

    score: Callable[[ScoreInputs], Scores]
    needs: tuple[Observable, ...] = ()

    @property
    def probes(self) -> bool:
        """Whether every refresh needs a probe: inputs alone are observed with every step."""
        return not set(self.needs) <= {"inputs"}

    @property
    def predicts(self) -> bool:
        """Whether low-rank approximations of weights predict activations."""
        return bool({"predicted", "norms"} & set(self.needs))

    @property
    def measures_updates(self) -> bool:
        """Whether the score is of a unit's update, not of its part in the forward pass."""
        return "updates" in self.needs

    @property
    def needs_inputs_only(self) -> bool:
        """Whether a branch's input is enough, before its units are computed."""
        return set(self.needs) <= {"inputs", "predicted", "norms"}


def uniform(inputs: ScoreInputs) -> Scores:
    """Return random scores, new at every draw."""
    return jax.random.uniform(inputs.key, inputs.reads[0].shape[:2])


def magnitude(inputs: ScoreInputs) -> Scores:
    """Return Σ ‖W_:j‖₂ over the columns of all matrices."""
    return _sum(jnp.linalg.norm(w, axis=-1) for w in inputs.reads + inputs.writes)


def wanda(inputs: ScoreInputs) -> Scores:
    """Return Σ_i |W_ij| · rms(x_i), over the columns of what reads."""
    return _sum(jnp.einsum("LNCD,LD->LNC", jnp.abs(w), inputs.rms) for w in inputs.reads)


def maxip(inputs: ScoreInputs) -> Scores:
    """Return |Σ_i W_ij · mean(x_i)|, summed over the columns of what reads."""
    return _sum(jnp.abs(jnp.einsum("LNCD,LD->LNC", w, inputs.mean)) for w in inputs.reads)


def output(inputs: ScoreInputs) -> Scores:
    """Return ‖a_j‖₂ · ‖W_out,j‖₂ of a channel, ‖o_h W_o,h‖₂ of a head or group: an rms over tokens.

    `svd` is the same of outputs predicted with weights of low rank (see `nn.low_rank`).
    """
    assert inputs.energy is not None
    return jnp.sqrt(inputs.energy)


def sparselora(inputs: ScoreInputs) -> Scores:
    """Return ‖a_j‖₂ of a channel, and ‖q‖ · ‖k‖ · ‖v‖ of a head, predicted at low rank (`_norms`).

    SparseLoRA keeps columns of heads: of queries and keys by the product of their norms, of values
    by their norm. A head here has both, and a group the sum over its query heads.
    """
    assert inputs.norm is not None
    return inputs.norm


def taylor(inputs: ScoreInputs) -> Scores:
    """Return |Σ ⟨a_j, ∂L/∂a_j⟩|: the change of the loss, to first order, without the unit."""
    assert inputs.gradient is not None
    return jnp.abs(inputs.gradient)


def gradient_l1(inputs: ScoreInputs) -> Scores:
    """Return Σ|g| over the unit's parameters, with the gradient g of the mean loss."""
    assert inputs.update is not None
    return inputs.update.absolute


def gradient_l2(inputs: ScoreInputs) -> Scores:
    """Return (Σg²)^½ over the unit's parameters."""
    assert inputs.update is not None
    return jnp.sqrt(inputs.update.square)


def update_gain(inputs: ScoreInputs) -> Scores:
    """Return -Σ g · Δ over the unit's parameters: by how much the optimizer's change Δ of the unit
    decreases the loss, to first order. Negative where the momentum opposes the gradient."""
    assert inputs.update is not None
    return inputs.update.gain


METRICS: Mapping[str, Metric] = {
    "uniform": Metric(uniform),
    "magnitude": Metric(magnitude),
    "wanda": Metric(wanda, needs=("inputs",)),
    "maxip": Metric(maxip, needs=("inputs",)),
    "output": Metric(output, needs=("outputs",)),
    "svd": Metric(output, needs=("predicted",)),
    "sparselora": Metric(sparselora, needs=("norms",)),
    "taylor": Metric(taylor, needs=("gradients",)),
    "gradient_l1": Metric(gradient_l1, needs=("updates",)),
    "gradient_l2": Metric(gradient_l2, needs=("updates",)),
    "update_gain": Metric(update_gain, needs=("updates",)),
}


def score_inputs(
    layout: Layout[Any],
    params: Mapping[str, Array],
    stats: Statistics,
    unit: str,
    key: PRNGKeyArray,
) -> ScoreInputs:
    """Return what metrics use for the units of this name, N in a layer: those within all units
    around them, one after the other. `params` has at least the arrays of their branch."""
    total = layout.totals(unit)
    matrices: dict[str, list[Array]] = {"read": [], "write": []}
    for path, leaf in layout.with_role("read", "write"):
        if unit in leaf.axes and leaf.axes[-1] == EMBED:
            weight = params[path]
            matrices[leaf.role].append(weight.reshape(len(weight), total, -1, weight.shape[-1]))
    branch = layout.branches[layout.units[unit].branch]
    innermost = branch.units[-1]
    rms = mean = energy = norm = gradient = update = None
    if innermost in stats.inputs:
        sums = stats.inputs[innermost]
        rms, mean = jnp.sqrt(sums.square / stats.count), sums.linear / stats.count
    if innermost in stats.outputs:
        energy = stats.outputs[innermost]
        if energy.ndim == 1 + len(branch.units):  # squares of activations of one number
            (write,) = matrices["write"]
            energy = energy * jnp.square(write).sum((-2, -1))
        elif unit == innermost:
            energy = jnp.diagonal(energy, axis1=-2, axis2=-1)
        energy = energy.reshape(len(energy), total, -1).sum(-1)
        # Rounding can leave the energy of a head that adds nothing a little below zero.
        energy = jnp.maximum(energy, 0) / stats.count
    if innermost in stats.norms:
        norm = _norms(stats.norms[innermost], stats.count)
        norm = norm.reshape(len(norm), total, -1).sum(-1)
    if innermost in stats.gradients:
        gradient = stats.gradients[innermost]
        gradient = gradient.reshape(len(gradient), total, -1).sum(-1) / stats.count
    if unit in stats.updates:
        sums_of_unit = (x.reshape(len(x), total) / stats.count for x in stats.updates[unit])
        update = UpdateSums(*sums_of_unit)
    reads, writes = (tuple(matrices[role]) for role in ("read", "write"))
    return ScoreInputs(reads, writes, rms, mean, energy, norm, gradient, update, key)


def _norms(squares: Mapping[str, Array], count: Array) -> Array:
    """Return root mean squares over tokens from sums of squares, `[L, *units]`: of activations; of
    heads Σ_e ‖q_e‖ ‖k_e‖ over the columns of a head, multiplied by ‖v‖. A query head is paired with
    the key and the value of its own group."""
    rms = {name: jnp.sqrt(jnp.maximum(sums, 0) / count) for name, sums in squares.items()}
    if "activation" in rms:
        return rms["activation"]
    query = rms["query"]
    key, value = (
        rms[name].reshape(*rms[name].shape[:2], *(1,) * (query.ndim - rms[name].ndim), -1)
        for name in ("key", "value")
    )
    return jnp.sum(query * key, axis=-1) * jnp.linalg.norm(value, axis=-1)


def _sum(columns: Iterable[Float[Array, "L N C"]]) -> Scores:
    """Return one score a unit from those of its columns, for each of its matrices."""
    return jnp.sum(jnp.stack([jnp.sum(c, axis=-1) for c in columns], axis=-1), axis=-1)
