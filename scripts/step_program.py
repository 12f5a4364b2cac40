"""The programs that benchmarks time and compile: a training step, or its optimizer alone.

Of any size and by shapes; nothing of the data pipeline is imported.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sat_jax.models.params import abstract, shapes
from sat_jax.sparsity.masks import Masks, SegmentMasks
from sat_jax.sparsity.neurons import take_kept
from sat_jax.train.state import TrainState, new_state
from sat_jax.train.update import update, update_in_place

from sat_jax.config import OptimizerConfig
from sat_jax.data.batch import Batch
from sat_jax.models.decoder_config import DecoderConfig
from sat_jax.nn.decoder import Compute
from sat_jax.ops import KernelConfig
from sat_jax.sparsity.plan import Neurons, Plan
from sat_jax.sparsity.statistics import Statistics
from sat_jax.train.optimizer import clipping, learning_rate, make_optimizer
from sat_jax.train.step import StepSettings, make_step


class Program(NamedTuple):
    """`function(state, masks, given)` → (state, something small), and the shapes of what it takes:
    of the state that it trains, not of what rests beside."""

    function: Callable[..., tuple[TrainState, Any]]
    state: TrainState
    masks: Masks
    given: Any


def step_program(
    model: DecoderConfig,
    plan: Plan,
    compute: Compute,
    rows: tuple[int, int],
    execution: str = "gather",
    config: OptimizerConfig = OptimizerConfig(),
) -> Program:
    """One step of what a plan trains; `given` is a batch of `rows` (how many, tokens in each)."""
    if execution == "kernel" and compute.kernels is None:
        compute = dataclasses.replace(compute, kernels=KernelConfig(plan.block))
    graph, _ = abstract(model, plan.segments, compute, execution == "mask")
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

    def function(state: TrainState, masks: Masks, batch: Batch) -> tuple[TrainState, Any]:
        after, _, metrics = step(state, Statistics(jnp.zeros(())), masks, batch)
        return after, metrics.loss

    whole = jax.ShapeDtypeStruct(rows, np.int32)
    batch = Batch(whole, whole, whole, whole, jax.ShapeDtypeStruct(rows, np.bool_))
    return Program(function, *_state(model, plan, execution, config), batch)


def optimizer_program(
    model: DecoderConfig, plan: Plan, execution: str, config: OptimizerConfig
) -> Program:
    """What the optimizer does in a step, clipping included; `given` are the gradients."""
    optimizer, clip = make_optimizer(config, 1000), clipping(config)
    in_place = execution == "kernel"

    def function(state: TrainState, masks: Masks, grads: Any) -> tuple[TrainState, Any]:
        norm = optax.tree.norm(grads)
        if in_place:
            return update_in_place(optimizer, grads, clip(norm), state, masks), norm
        return update(optimizer, grads, clip(norm), state), norm

    state, masks = _state(model, plan, execution, config)
    grads = jax.eval_shape(take_kept, state.params, masks) if in_place else state.params
    return Program(function, state, masks, grads)


def filled(program: Program, model: DecoderConfig, plan: Plan) -> tuple[TrainState, Masks, Any]:
    """Random parameters and gradients, zero moments, masks that keep random neurons of each layer,
    and random tokens, each row one document."""

    def state() -> TrainState:
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), program.state)
        return zeros._replace(params=_random(program.state.params))

    def given() -> Any:
        if not isinstance(program.given, Batch):
            return _random(program.given)
        shape = program.given.tokens.shape
        tokens = jax.random.randint(jax.random.key(1), shape, 0, model.vocab_size, jnp.int32)
        positions = jnp.broadcast_to(jnp.arange(shape[1], dtype=jnp.int32), shape)
        ones = jnp.ones(shape, jnp.int32)
        return Batch(tokens, tokens, ones, positions, ones.astype(bool))

    rng = np.random.default_rng(0)

    def kept(shape: Any, total: int, unit: int) -> jax.Array:
        units = rng.permuted(np.tile(np.arange(total // unit), (shape.shape[0], 1)), axis=1)
        units = np.sort(units[:, : shape.shape[1] // unit], axis=1)
        rows = units[..., None] * unit + np.arange(unit)
        return jnp.asarray(rows.reshape(shape.shape), shape.dtype)

    masks = tuple(
        SegmentMasks(
            None if mask.heads is None else kept(mask.heads, model.n_kv_heads, 1),
            None if mask.channels is None else kept(mask.channels, model.d_ff, plan.block),
        )
        for mask in program.masks
    )
    return jax.jit(state)(), masks, jax.jit(given)()


def whole_state(model: DecoderConfig, config: OptimizerConfig) -> TrainState:
    """Shapes of the state outside of any rung."""
    state: TrainState = jax.eval_shape(
        lambda params: new_state(params, make_optimizer(config, 1000)), shapes(model)
    )
    return state


def neurons_of(model: DecoderConfig) -> Neurons:
    """What there is to omit."""
    return Neurons(model.n_layers, model.n_kv_heads, model.query_heads, model.d_ff)


def _state(
    model: DecoderConfig, plan: Plan, execution: str, config: OptimizerConfig
) -> tuple[TrainState, Masks]:
    """Shapes of what is trained (compacted, or whole and cut into segments) and of the masks."""
    gathers = execution == "gather"
    _, values = abstract(model, plan.segments, masked=not gathers)
    params = {path: x for path, x in values.items() if "/kept_" not in path}
    optimizer = make_optimizer(config, 1000)
    state: TrainState = jax.eval_shape(lambda params: new_state(params, optimizer), params)
    return state, () if gathers else masks_of(model, plan)


def masks_of(model: DecoderConfig, plan: Plan) -> Masks:
    """Shapes of a plan's masks of KV groups and channels."""

    def kept(layers: int, kept: int, total: int) -> Any:
        return None if kept == total else jax.ShapeDtypeStruct((layers, kept), np.int32)

    return tuple(
        SegmentMasks(
            kept(s.layers, s.kv_groups, model.n_kv_heads), kept(s.layers, s.channels, model.d_ff)
        )
        for s in plan.segments
    )


def _random(values: dict[str, Any]) -> dict[str, jax.Array]:
    keys = jax.random.split(jax.random.key(0), len(values))
    return {
        path: 0.02 * jax.random.normal(key, shape.shape)
        for key, (path, shape) in zip(keys, values.items(), strict=True)
    }
