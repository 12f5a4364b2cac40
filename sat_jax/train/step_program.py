"""The programs of a training step and of its optimizer for any model, described by shapes alone.

Benchmarks time them on random arrays, or compile them for an absent device. Of the data pipeline
only the arrays of a batch are imported.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sat_jax.config import OptimizerConfig
from sat_jax.data.batch import Batch
from sat_jax.nn.decoder import Decoder
from sat_jax.nn.layout import Layout
from sat_jax.nn.param import CHANNEL
from sat_jax.ops import Implementation, KernelConfig
from sat_jax.sparsity.choose import Criteria, choose
from sat_jax.sparsity.execution.base import Execution
from sat_jax.sparsity.execution.gather import Gather
from sat_jax.sparsity.execution.kernel import Kernel
from sat_jax.sparsity.execution.mask import Mask
from sat_jax.sparsity.execution.state import TrainState, new_state
from sat_jax.sparsity.plan import make_plan, neurons_of
from sat_jax.sparsity.rows import Kept
from sat_jax.sparsity.statistics import Statistics
from sat_jax.train.moves import compile_moves
from sat_jax.train.optimizer import clipping, learning_rate, make_optimizer
from sat_jax.train.programs import compact_state
from sat_jax.train.step import StepSettings, make_step

Trained = Literal["dense", "gather", "kernel", "mask"]

_STEPS = 1000  # length of the learning rate schedule


class Program(NamedTuple):
    """`function(state, kept, inputs)` → (state, a scalar), and the shapes of its arguments: the
    state that is trained, the kept units, and a batch or gradients."""

    function: Callable[..., tuple[TrainState, Any]]
    state: TrainState
    kept: Kept
    inputs: Any


def make_case(
    layout: Layout[Decoder], trained: Trained, rate: float, kernels: Implementation | None = None
) -> Execution:
    """Return how a step is trained that omits `rate` of the units of every branch in all layers.
    `kernel` keeps blocks of 128 channels, or of 64 where there are no more than 128."""
    neurons = neurons_of(layout)
    block = 1
    if trained == "kernel":
        block = 128 if neurons.size(CHANNEL) > 128 else 64
    plan = make_plan(neurons, rate, rate, block=block)
    if trained == "kernel":
        return Kernel(layout, plan, kernel=KernelConfig(block, kernels))
    return Mask(layout, plan) if trained == "mask" else Gather(layout, plan)


def step_program(
    execution: Execution, optimizer: OptimizerConfig, shape: tuple[int, int]
) -> Program:
    """Return one training step on a batch of `shape` (rows, tokens in each)."""
    settings = StepSettings(
        make_optimizer(optimizer, _STEPS, execution.layout),
        clipping(optimizer),
        learning_rate(optimizer, _STEPS),
    )
    step = make_step(execution, settings)

    def function(state: TrainState, kept: Kept, batch: Batch) -> tuple[TrainState, Any]:
        after, _, metrics = step(state, Statistics(jnp.zeros(())), kept, batch)
        return after, metrics.loss

    numbers = jax.ShapeDtypeStruct(shape, np.int32)
    mask = jax.ShapeDtypeStruct(shape, np.bool_)
    batch = Batch(numbers, numbers, numbers, numbers, mask)
    return Program(function, *_state_shapes(execution, optimizer), batch)


def optimizer_program(execution: Execution, optimizer: OptimizerConfig) -> Program:
    """Return the optimizer's part of a training step, clipping included, on given gradients."""
    transform = make_optimizer(optimizer, _STEPS, execution.layout)
    clip = clipping(optimizer)

    def function(state: TrainState, kept: Kept, grads: dict[str, Any]) -> tuple[TrainState, Any]:
        norm = optax.tree.norm(grads)
        return execution.update(transform, grads, clip(norm), state, kept), norm

    state, kept = _state_shapes(execution, optimizer)
    return Program(function, state, kept, jax.eval_shape(execution.trained, state.params, kept))


def random_arguments(program: Program, execution: Execution) -> tuple[TrainState, Kept, Any]:
    """Return arguments of a program: random parameters, kept units, and tokens or gradients; the
    moments are zero."""
    if isinstance(program.inputs, Batch):
        inputs: Any = random_batch(execution.layout, program.inputs.tokens.shape)
    else:
        inputs = jax.jit(lambda: _random(program.inputs))()
    kept = jax.jit(lambda: _choose(execution))()
    return random_state(program.state), kept, inputs


def random_state(shapes: TrainState) -> TrainState:
    """Return a state of these shapes with random parameters and zero moments."""

    def state() -> TrainState:
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        return zeros._replace(params=_random(shapes.params))

    random: TrainState = jax.jit(state)()
    return random


def random_batch(layout: Layout[Decoder], shape: tuple[int, int]) -> Batch:
    """Return random tokens; each row is one document without padding."""
    path, leaf = next((p, leaf) for p, leaf in layout.leaves.items() if "vocab" in leaf.axes)
    vocabulary = layout.shapes[path].shape[leaf.axis("vocab")]
    tokens = jax.random.randint(jax.random.key(1), shape, 0, vocabulary, jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(shape[1], dtype=jnp.int32), shape)
    ones = jnp.ones(shape, jnp.int32)
    return Batch(tokens, tokens, ones, positions, ones.astype(bool))


def full_state(layout: Layout[Decoder], optimizer: OptimizerConfig) -> TrainState:
    """Return the shapes of a full state."""
    transform = make_optimizer(optimizer, _STEPS, layout)
    state: TrainState = jax.eval_shape(lambda p: new_state(p, transform), dict(layout.shapes))
    return state


def refresh_bytes(
    execution: Execution,
    optimizer: OptimizerConfig,
    memory_of: Callable[[Callable[..., Any], tuple[Any, ...], tuple[int, ...]], Any],
) -> int:
    """Return the most memory that converting the state needs: the full state, and the results of
    the largest chunk, whose source is freed after them. `memory_of(function, shapes, donated)`
    returns XLA's memory analysis of a program."""
    state, kept = full_state(execution.layout, optimizer), kept_shapes(execution)
    chunks = [0]

    def compiled(function: Callable[..., Any], *shapes: Any, donate_argnums: Any) -> Any:
        memory = memory_of(function, shapes, donate_argnums)
        new = memory.output_size_in_bytes - memory.alias_size_in_bytes
        chunks.append(new + memory.temp_size_in_bytes)
        return function

    compile_moves(state, kept, execution, lambda tree: tree, compiled)
    return count_bytes(state) + max(chunks)


def count_bytes(state: TrainState) -> int:
    """Return the bytes of a state or of its shapes."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))


def kept_shapes(execution: Execution) -> Kept:
    """Return the shapes of the kept indices."""
    kept: Kept = jax.eval_shape(lambda: _choose(execution))
    return kept


def _choose(execution: Execution) -> Kept:
    """Return random kept units; the parameters, of which scores use the shapes, are never made."""
    layout = execution.layout
    params = {path: jnp.zeros(leaf.shape, leaf.dtype) for path, leaf in layout.shapes.items()}
    stats, criteria = Statistics(jnp.zeros(())), Criteria("uniform")
    return choose(layout, params, stats, execution.plan, criteria, jax.random.key(0)).kept


def _state_shapes(execution: Execution, optimizer: OptimizerConfig) -> tuple[TrainState, Kept]:
    """Return the shapes of the state that is trained and of the kept units."""
    full, kept = full_state(execution.layout, optimizer), kept_shapes(execution)
    state, _ = jax.eval_shape(lambda s, k: compact_state(execution, s, k), full, kept)
    return state, kept


def _random(shapes: Any) -> Any:
    leaves, structure = jax.tree.flatten(shapes)
    # This generator compiles several times faster than the default one.
    keys = jax.random.split(jax.random.key(0, impl="unsafe_rbg"), len(leaves))
    arrays = [0.02 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(structure, arrays)
