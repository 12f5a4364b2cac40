"""Pipeline parallelism: the layers in equal stages over the mesh axis `pipeline` (GPipe, Huang et
al., arXiv:1811.06965).

Microbatches pass through a shift register over the stages: in every tick each device computes its
layers on one microbatch and sends the result to the device of the next stage. Outside the pipeline
`pipeline` splits the rows, like `data`. A second register brings each microbatch from the device
that embedded it to the first stage, and the result from the last stage back.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from sat_jax.nn.context import Context
from sat_jax.nn.mesh_axes import PIPELINE, ROW_AXES
from sat_jax.nn.stack import Remat, scan_layers, segments_of

_OTHER_ROW_AXES = tuple(axis for axis in ROW_AXES if axis != PIPELINE)


def number_of_stages() -> int:
    """Return the size of the mesh axis `pipeline`; 1 without a mesh and inside a pipeline."""
    mesh = jax.sharding.get_abstract_mesh()
    if PIPELINE in mesh.manual_axes:
        return 1
    return dict(zip(mesh.axis_names, mesh.axis_sizes, strict=True)).get(PIPELINE, 1)


def pipeline_layers(
    block: nnx.Module,
    x: Float[Array, "B T D"],
    context: Context,
    *,
    dtype: str,
    remat: Remat,
    microbatches: int,
) -> Float[Array, "B T D"]:
    """Return the residual stream after all layers, as `scan_layers` does.

    The rows are split evenly over the mesh's `ROW_AXES`, and `microbatches` is a multiple of the
    stages. With remat `full` each microbatch's input of a stage is saved, and the inputs of the
    stage's layers for one microbatch at a time.
    """
    stages = number_of_stages()
    graph, state = nnx.split(block)
    assert len(segments_of(state)) == 1, "stages are of layers in one segment"
    assert not context.observe and context.selection is None, "stages return no observations"

    def stage(state: nnx.State, inputs: Any) -> Any:
        x, segment_ids, rotary = inputs
        own = dataclasses.replace(context, segment_ids=segment_ids, rotary=rotary)
        x, _, _ = scan_layers(nnx.merge(graph, state), x, own, dtype=dtype, remat=remat)
        return x, segment_ids, rotary

    if remat == "full":
        stage = jax.checkpoint(stage, prevent_cse=False)

    def run(state: nnx.State, rows: Any) -> Any:
        index = jax.lax.axis_index(PIPELINE)
        count = microbatches // stages  # of each device's stream

        def tick(carry: Any, time: Array) -> tuple[Any, None]:
            register, stream = carry
            slot = time % count
            current = jax.tree.map(lambda s: s[slot], stream)
            inputs = _where(index == 0, current, register)
            outputs = stage(state, inputs)
            arriving = _where(index == stages - 1, outputs, _shift(current, stages, -1))
            stream = jax.tree.map(
                lambda s, a: jax.lax.dynamic_update_index_in_dim(s, a, slot, 0), stream, arriving
            )
            return (_shift(outputs, stages, 1), stream), None

        stream = jax.tree.map(lambda a: a[0], rows)
        register = jax.tree.map(lambda s: jnp.zeros_like(s[0]), stream)
        ticks = jnp.arange(microbatches + stages - 1)
        (_, (x, _, _)), _ = jax.lax.scan(tick, (register, stream), ticks)
        # Results start to arrive stages - 1 ticks late.
        return jnp.roll(x, -(stages - 1), axis=0)[None]

    rows = jax.tree.map(
        lambda a: _to_microbatches(a, stages, microbatches),
        (x, context.segment_ids, context.rotary),
    )
    x_SMBTD = jax.shard_map(
        run,
        in_specs=(P(PIPELINE), P(PIPELINE)),
        out_specs=P(PIPELINE),
        axis_names={PIPELINE},
        # Loop carries start replicated and end varying over devices.
        check_vma=False,
    )(state, rows)
    return _to_rows(x_SMBTD)


def _shift(tree: Any, stages: int, by: int) -> Any:
    """Return each device's values from the device `by` stages before it; zeros without one."""
    pairs = [(s, s + by) for s in range(stages) if 0 <= s + by < stages]
    return jax.tree.map(lambda a: jax.lax.ppermute(a, PIPELINE, pairs), tree)


def _where(condition: Array, chosen: Any, other: Any) -> Any:
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), chosen, other)


def _to_microbatches(rows: Array, stages: int, microbatches: int) -> Array:
    """Return `[B, ...]` as `[stages, microbatches / stages, rows of one, ...]`: every device keeps
    its own rows."""
    parts = _row_parts()
    split = rows.reshape(stages, parts, microbatches // stages, -1, *rows.shape[1:])
    merged = split.swapaxes(1, 2).reshape(stages, microbatches // stages, -1, *rows.shape[1:])
    return jax.lax.with_sharding_constraint(merged, P(PIPELINE, None, _OTHER_ROW_AXES))


def _to_rows(microbatches: Array) -> Array:
    """Return the rows in the order that they had before `_to_microbatches`."""
    stages, count, _, *rest = microbatches.shape
    split = microbatches.reshape(stages, count, _row_parts(), -1, *rest).swapaxes(1, 2)
    return jax.lax.with_sharding_constraint(split.reshape(-1, *rest), P(ROW_AXES))


def _row_parts() -> int:
    """Return the number of devices that share the rows of a microbatch."""
    mesh = jax.sharding.get_abstract_mesh()
    return math.prod(mesh.shape[axis] for axis in _OTHER_ROW_AXES)
