"""Kept neurons as indices: one int32 array a segment and module."""

from collections.abc import Mapping
from typing import NamedTuple

import jax
from jaxtyping import Array, Int, PRNGKeyArray

from sat_jax.sparsity.importance import METRICS, channel_evidence, head_evidence
from sat_jax.sparsity.plan import AttentionUnit, Neurons, Plan, Segment
from sat_jax.sparsity.selection import Selection, select
from sat_jax.sparsity.statistics import Statistics


class Criteria(NamedTuple):
    """How neurons are judged and chosen: names and numbers of `SparsityConfig`."""

    metric: str = "output"
    selection: Selection = "topk"
    temperature: float = 1.0


class SegmentMasks(NamedTuple):
    """Kept indices of one segment's layers, int32, sorted and unique; None: everything is kept.

    `heads` is `[L, kept]` KV groups, or `[L, K, kept]` query heads within each group; `channels` is
    `[L, kept]`.
    """

    heads: Int[Array, "L *K kept"] | None
    channels: Int[Array, "L kept"] | None


Masks = tuple[SegmentMasks, ...]

_SELECTION = 1  # the purpose of a random key: what it is folded with after the seed


def selection_key(seed: int, step: Int[Array, ""]) -> PRNGKeyArray:
    """The key of what is drawn for one step, traced or not."""
    key = jax.random.fold_in(jax.random.key(seed), _SELECTION)
    return jax.random.fold_in(key, step)


def choose(
    params: Mapping[str, Array],
    stats: Statistics,
    plan: Plan,
    neurons: Neurons,
    criteria: Criteria,
    key: PRNGKeyArray,
) -> Masks:
    """The masks of a plan for a whole model: all neurons of a layer are scored, the best kept."""
    metric, selection, temperature = criteria
    masks = []
    for segment in plan.segments:
        head_key, channel_key = jax.random.split(jax.random.fold_in(key, segment.start))
        heads = channels = None
        if not neurons.heads_whole(segment):
            heads = _choose_heads(params, stats, plan, segment, neurons, criteria, head_key)
        if not neurons.channels_whole(segment):
            score_key, draw_key = jax.random.split(channel_key)
            evidence = channel_evidence(params, stats, score_key)
            scores = METRICS[metric].score(evidence)
            channels = select(
                scores[segment.start : segment.stop],
                segment.channels,
                selection=selection,
                key=draw_key,
                balance=plan.balance,
                block=plan.block,
                temperature=temperature,
            )
        masks.append(SegmentMasks(heads, channels))
    return tuple(masks)


def _choose_heads(
    params: Mapping[str, Array],
    stats: Statistics,
    plan: Plan,
    segment: Segment,
    neurons: Neurons,
    criteria: Criteria,
    key: PRNGKeyArray,
) -> Int[Array, "L *K kept"]:
    metric, selection, temperature = criteria
    score_key, draw_key = jax.random.split(key)
    by_group = segment.query_heads == neurons.query_heads
    unit: AttentionUnit = "kv_group" if by_group else "query_head"
    evidence = head_evidence(params, stats, unit, score_key)
    scores = METRICS[metric].score(evidence)[segment.start : segment.stop]
    if by_group:
        keep, balance = segment.kv_groups, plan.balance
    else:
        scores = scores.reshape(segment.layers, neurons.kv_groups, neurons.query_heads)
        keep, balance = segment.query_heads, 1
    return select(
        scores,
        keep,
        selection=selection,
        key=draw_key,
        balance=balance,
        temperature=temperature,
    )
