"""The training step that benchmarks time and compile: of any size, by shapes alone."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sat_jax.config import OptimizerConfig
from sat_jax.data.batch import Batch
from sat_jax.models.llama import Compute
from sat_jax.models.llama_config import LlamaConfig
from sat_jax.models.params import abstract
from sat_jax.ops import BlockSparse
from sat_jax.sparsity.masks import Masks, SegmentMasks
from sat_jax.sparsity.plan import Neurons, Plan
from sat_jax.sparsity.statistics import Statistics
from sat_jax.train.optimizer import clipping, learning_rate, make_optimizer
from sat_jax.train.state import TrainState, new_state
from sat_jax.train.step import StepSettings, make_step


class StepProgram(NamedTuple):
    """A step and the shapes of what it takes: of the state it trains, not of what rests beside."""

    function: Callable[..., Any]
    state: TrainState
    masks: Masks
    batch: Batch


def step_program(
    model: LlamaConfig,
    plan: Plan,
    compute: Compute,
    rows: tuple[int, int],
    execution: str = "gather",
    config: OptimizerConfig = OptimizerConfig(),
) -> StepProgram:
    """One optimizer step of what a plan trains, on `rows` (how many, tokens in each)."""
    if execution == "kernel":
        compute = dataclasses.replace(compute, kernels=compute.kernels or BlockSparse(plan.block))
    graph, shapes = abstract(model, plan.segments, compute, execution == "mask")
    if execution != "gather":  # whole matrices are trained
        _, shapes = abstract(model, plan.segments, masked=True)
        shapes = {path: x for path, x in shapes.items() if "/kept_" not in path}
    settings = StepSettings(
        optimizer=make_optimizer(config, 1000),
        clip=clipping(config),
        schedule=learning_rate(config, 1000),
        microbatches=1,
        observe=(),
        stats_decay=0.0,
        freeze=True,
        in_place=execution == "kernel",
    )
    step = make_step(graph, settings)

    def function(state: TrainState, masks: Masks, batch: Batch) -> Any:
        after, _, metrics = step(state, Statistics(jnp.zeros(())), masks, batch)
        return after, metrics

    state = jax.eval_shape(lambda params: new_state(params, settings.optimizer), shapes)
    whole = jax.ShapeDtypeStruct(rows, np.int32)
    batch = Batch(whole, whole, whole, whole, jax.ShapeDtypeStruct(rows, np.bool_))
    return StepProgram(function, state, _masks(model, plan) if execution != "gather" else (), batch)


def neurons(model: LlamaConfig) -> Neurons:
    """What there is to omit."""
    return Neurons(model.n_layers, model.n_kv_heads, model.query_heads, model.d_ff)


def _masks(model: LlamaConfig, plan: Plan) -> Masks:
    """Shapes of a plan's masks of KV groups and channels."""

    def kept(layers: int, kept: int, total: int) -> Any:
        return None if kept == total else jax.ShapeDtypeStruct((layers, kept), np.int32)

    return tuple(
        SegmentMasks(
            kept(s.layers, s.kv_groups, model.n_kv_heads), kept(s.layers, s.channels, model.d_ff)
        )
        for s in plan.segments
    )
