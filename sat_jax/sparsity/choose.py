"""Scores → kept units, for all layers of a plan."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
from jaxtyping import Array, Int, PRNGKeyArray

from sat_jax.errors import UserError
from sat_jax.nn.layout import Layout, Unit
from sat_jax.nn.param import CHANNEL
from sat_jax.sparsity.importance import METRICS, score_inputs
from sat_jax.sparsity.plan import Plan, Segment, neurons_of
from sat_jax.sparsity.rows import Kept
from sat_jax.sparsity.selection import Selection, Unranked, count_unranked, select
from sat_jax.sparsity.statistics import Statistics

_SELECTION = 1  # the purpose of a random key: what it is folded with after the seed


class Choice(NamedTuple):
    """The kept units, and by unit how many layers have scores that are no ranking: there units are
    drawn uniformly."""

    kept: Kept
    unranked: dict[str, Unranked]


class Criteria(NamedTuple):
    """How units are scored and chosen: names and numbers of `SparsityConfig`."""

    metric: str = "output"
    selection: Selection = "topk"


def selection_key(seed: int, step: Int[Array, ""]) -> PRNGKeyArray:
    """Return the key of what is drawn for one step, traced or not."""
    key = jax.random.fold_in(jax.random.key(seed), _SELECTION)
    return jax.random.fold_in(key, step)


def choose(
    layout: Layout[Any],
    params: Mapping[str, Array],
    stats: Statistics,
    plan: Plan,
    criteria: Criteria,
    key: PRNGKeyArray,
) -> Choice:
    """Return the kept units of a plan: in each layer all are scored and the best are kept."""
    neurons, kept = neurons_of(layout), []
    unranked: dict[str, list[Unranked]] = {}
    for segment in plan.segments:
        keys = branch_keys(layout, jax.random.fold_in(key, segment.start))
        chosen = {}
        for unit in neurons.omitted(segment):
            chosen[unit.name], counts = choose_units(
                *(layout, params, stats, plan, segment, unit, criteria, keys[unit.branch])
            )
            unranked.setdefault(unit.name, []).append(counts)
        kept.append(chosen)
    sums = {name: jax.tree.map(lambda *n: sum(n), *counts) for name, counts in unranked.items()}
    return Choice(tuple(kept), sums)


def describe_unranked(unranked: Mapping[str, Unranked], metric: str) -> Iterator[str]:
    """Yield a sentence for each unit with layers whose scores are all equal. Raises `UserError`
    where scores are not finite."""
    for unit, counts in unranked.items():
        scores = f"the scores (metric {metric!r}) of {unit} are"
        if layers := int(counts.not_finite):
            raise UserError(
                f"{scores} not finite in {layers} layers: the weights or activations are not"
                " finite, or too large for model.dtype"
            )
        if layers := int(counts.equal):
            yield f"{scores} all equal in {layers} layers, where the kept ones are drawn at random"


def branch_keys(layout: Layout[Any], key: PRNGKeyArray) -> dict[str, PRNGKeyArray]:
    """Return a key for each branch."""
    return dict(zip(layout.branches, jax.random.split(key, len(layout.branches)), strict=True))


def choose_units(
    layout: Layout[Any],
    params: Mapping[str, Array],
    stats: Statistics,
    plan: Plan,
    segment: Segment,
    unit: Unit,
    criteria: Criteria,
    key: PRNGKeyArray,
) -> tuple[Int[Array, "L *within kept"], Unranked]:
    """Return the kept units of one name in the segment's layers, and in how many layers the scores
    are no ranking. `params` and `stats` are of all layers, or of the segment's alone."""
    score_key, draw_key = jax.random.split(key)
    inputs = score_inputs(layout, params, stats, unit.name, score_key)
    scores = METRICS[criteria.metric].score(inputs)
    if len(scores) > segment.layers:
        scores = scores[segment.start : segment.stop]
    within = [layout.units[name].size for name in unit.within]
    scores = scores.reshape(len(scores), *within, unit.size)
    kept = select(
        scores,
        segment.kept(unit.name),
        selection=criteria.selection,
        key=draw_key,
        balance=1 if within else plan.balance,
        block=plan.block if unit.name == CHANNEL else 1,
    )
    return kept, count_unranked(scores)
