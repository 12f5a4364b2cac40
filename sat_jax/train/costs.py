"""Floating-point operations of the parts of a run, from its settings."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from sat_jax.config import Config
from sat_jax.data.batch import Batch
from sat_jax.models.build import layout_of
from sat_jax.models.decoder_config import DecoderConfig
from sat_jax.nn.branch import branches
from sat_jax.nn.decoder import Decoder
from sat_jax.nn.layout import Layout
from sat_jax.sparsity.controller import Rung
from sat_jax.sparsity.execution.dynamic import observe_branch
from sat_jax.sparsity.execution.sparse_base import dense_count
from sat_jax.sparsity.flops import (
    correction_flops,
    forward_flops,
    probe_flops,
    traced_flops,
    training_flops,
)
from sat_jax.sparsity.importance import METRICS
from sat_jax.sparsity.plan import neurons_of
from sat_jax.sparsity.statistics import Observable, Statistics
from sat_jax.sparsity.stored_blocks import block_layout, has_fused_mlp
from sat_jax.train.layouts import projection_shape, run_layout
from sat_jax.train.probe import observe_batch, observed_by_probes, probe_shape


def step_flops(
    config: Config,
    model: DecoderConfig,
    rung: Rung | None = None,
    teacher: DecoderConfig | None = None,
) -> float:
    """Return the training FLOPs a token on a rung, recomputation, the forward pass of a teacher and
    projections of hidden states included; None: densely. Mask execution computes everything on
    every rung."""
    layout, segments, sparse = run_layout(config, model), None, config.sparsity
    if rung is not None:
        layout = block_layout(layout, rung.plan.stored)
    if rung is not None and sparse.execution != "mask":
        segments = rung.plan.segments
    length, sparse_base = config.data.row_length, None
    if segments is not None and sparse.adapters == "dense":
        sparse_base = dense_count(sparse.dense_answers, length) / length
    flops = training_flops(
        *(layout, length, segments, config.model.remat),
        kernels=sparse.execution == "kernel",
        fused_mlp=rung is not None and has_fused_mlp(layout_of(model), rung.plan.stored),
        passes=sparse.passes,
        dropped=() if rung is None else rung.plan.dropped,
        token_rate=0.0 if rung is None else rung.plan.token_rate,
        sparse_base=sparse_base,
    )
    chosen = 0.0 if rung is None else _flops_of_choice(config, layout, rung)
    shape = projection_shape(config, model, teacher)
    projections = 6.0 * math.prod(shape) if shape else 0.0  # forward, and backward to both operands
    return flops.total + chosen + teacher_flops(config, teacher) + projections


def _flops_of_choice(config: Config, layout: Layout[Decoder], rung: Rung) -> float:
    """Return the FLOPs a token by which layers that choose their units predict activations."""
    metric, sparse = METRICS[config.sparsity.metric], config.sparsity
    if sparse.refresh_every > 0 or not metric.predicts:
        return 0.0
    neurons, shape = neurons_of(layout), (config.train.rows_per_step, config.data.row_length)
    total = 0.0
    for segment in rung.plan.segments:
        for unit in neurons.omitted(segment):
            total += segment.layers * _prediction_flops(layout, unit.branch, shape, metric.needs)
    return total / math.prod(shape)


@functools.cache
def _prediction_flops(
    layout: Layout[Decoder], name: str, shape: tuple[int, int], needs: tuple[Observable, ...]
) -> float:
    """Return the FLOPs of one choice of units in a branch of a layer, for a batch of `shape`."""

    def observe(values: Any, x: jax.Array, weight: jax.Array) -> Statistics:
        graph, state = nnx.split(branches(layout.bind(values).layers)[name])
        branch = nnx.merge(graph, jax.tree.map(lambda leaf: leaf[0], state))
        return observe_branch(branch, x, weight, needs)

    width = next(layout.shapes[p].shape[-1] for p, _ in layout.with_role("write"))
    x = jax.ShapeDtypeStruct((*shape, width), jnp.float32)
    weight = jax.ShapeDtypeStruct(shape, jnp.float32)
    return traced_flops(observe, dict(layout.shapes), x, weight)


def teacher_flops(config: Config, teacher: DecoderConfig | None) -> float:
    """Return the FLOPs a token of the forward pass of a teacher with logits; 0 without one in the
    step."""
    if teacher is None or config.distill.topk is not None:
        return 0.0
    return forward_flops(layout_of(teacher), config.data.row_length).total


def flops_of_probe(config: Config, model: DecoderConfig) -> float:
    """Return the FLOPs of one probe."""
    sparse = config.sparsity
    rows, length = probe_shape(
        config.train.rows_per_step, config.data.row_length, sparse.probe_tokens
    )
    observe = observed_by_probes(sparse)
    layout = run_layout(config, model)
    passes = probe_flops(layout, length, "gradients" in observe)
    if "updates" in observe:  # with the gradients of all weights
        passes = training_flops(layout, length, remat=config.model.remat).total
    observations = observation_flops(model, rows, length, frozenset(observe))
    return rows * length * passes + observations


@functools.cache
def observation_flops(
    model: DecoderConfig, rows: int, length: int, observe: frozenset[Observable]
) -> float:
    """Return the FLOPs by which observations add to the forward pass of a probe of `rows` rows."""
    layout = layout_of(model)
    numbers = jax.ShapeDtypeStruct((rows, length), jnp.int32)
    batch = Batch(numbers, numbers, numbers, numbers, numbers)
    without, observed = (
        traced_flops(functools.partial(observe_batch, layout, observe=kinds), layout.shapes, batch)
        for kinds in ((), observe - {"gradients", "updates"})
    )
    return observed - without


def flops_of_block_gradients(config: Config, model: DecoderConfig, rung: Rung) -> float:
    """Return the FLOPs of one measurement of the gradients of all blocks: a pass over some tokens
    with the stored blocks, backward to activations, and the dense gradients of their matrices."""
    rows, length = probe_shape(
        config.train.rows_per_step, config.data.row_length, config.sparsity.probe_tokens
    )
    layout = layout_of(model)
    dense = sum(2.0 * math.prod(layout.shapes[path].shape) for path, _ in rung.plan.stored)
    passes = probe_flops(block_layout(layout, rung.plan.stored), length, gradients=True)
    return rows * length * (passes + dense)


def flops_of_selection(config: Config, model: DecoderConfig, rung: Rung) -> float:
    """Return the FLOPs of what follows a selection: the least-squares correction."""
    if not config.sparsity.least_squares_correction:
        return 0.0
    return correction_flops(layout_of(model), rung.plan.segments)
