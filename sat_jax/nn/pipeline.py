"""Pipeline parallelism: the layers in equal stages over the mesh axis `pipeline`.

With one stage on each device this is GPipe (Huang et al., arXiv:1811.06965). With several it is the
circular schedule: the layers are in as many segments as a device has stages, and each segment is
split over the devices, so that stage s is on device s mod devices. Microbatches in groups of as
many as there are devices pass through all stages, one group after the other.

Microbatches pass through a ring of registers: in every tick each device computes one stage on one
microbatch and sends the result to the next device. Outside the pipeline `pipeline` splits the rows,
like `data`. A second ring, in the other direction, brings each microbatch from the device that
embedded it to the first device, and the result from there to the same device.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from sat_jax.nn.context import Context
from sat_jax.nn.mesh_axes import CONTEXT, PIPELINE, ROW_AXES
from sat_jax.nn.stack import POLICIES, Remat, scan_layers, segments_of

_OTHER_ROW_AXES = tuple(axis for axis in ROW_AXES if axis != PIPELINE)


def number_of_stages() -> int:
    """Return the size of the mesh axis `pipeline`; 1 without a mesh and inside a pipeline."""
    mesh = jax.sharding.get_abstract_mesh()
    if PIPELINE in mesh.manual_axes:
        return 1
    return dict(zip(mesh.axis_names, mesh.axis_sizes, strict=True)).get(PIPELINE, 1)


def number_of_ticks(devices: int, rounds: int, microbatches: int) -> int:
    """Return the number of ticks in which all microbatches pass through `rounds` stages on each of
    `devices` devices: one for each stage of a device, and those in which the last device waits."""
    return rounds * microbatches + devices - 1


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

    Segments have the same shapes; each is one round of the microbatches through all devices. The
    rows are split evenly over the mesh's `ROW_AXES`, and `microbatches` is a multiple of the
    devices of the pipeline. With remat `full` each microbatch's input of a stage is saved, and the
    inputs of the stage's layers for one microbatch at a time.
    """
    devices = number_of_stages()
    graph, state = nnx.split(block)
    segments = segments_of(state)
    rounds = len(segments)
    assert not context.observe and context.selection is None, "stages return no observations"

    @functools.partial(jax.checkpoint, policy=POLICIES[remat], prevent_cse=False)
    def stage(layers: nnx.State, number: Array, inputs: Any) -> Any:
        """Return the results of the device's stage `number`."""
        x, segment_ids, rotary = inputs
        own = dataclasses.replace(context, segment_ids=segment_ids, rotary=rotary)
        size = len(jax.tree.leaves(layers)[0]) // rounds
        layers = jax.tree.map(
            lambda a: jax.lax.dynamic_slice_in_dim(a, number * size, size), layers
        )
        x, _, _ = scan_layers(nnx.merge(graph, layers), x, own, dtype=dtype, remat=remat)
        return x, segment_ids, rotary

    def run(segments: list[nnx.State], rows: Any) -> Any:
        first = jax.lax.axis_index(PIPELINE) == 0
        stream = jax.tree.map(lambda a: a[0], rows)
        layers = jax.tree.map(lambda *parts: jnp.concatenate(parts), *segments)

        def exchange(carry: Any, time: Array) -> tuple[Any, Any]:
            """Return the inputs of the devices' stages, and the stream. In ticks in which a group
            enters, the first device exchanges a result for a new microbatch."""
            register, stream = carry
            group, enters = time // (devices * rounds), time // devices % rounds == 0
            slot = (group * devices + time % devices) % (microbatches // devices)
            current = jax.tree.map(lambda s: s[slot], stream)
            arriving = _shift(_where(first, register, current), devices, -1)
            stored = _where(enters, arriving, current)
            stream = jax.tree.map(
                lambda s, a: jax.lax.dynamic_update_index_in_dim(s, a, slot, 0), stream, stored
            )
            return _where(first & enters, current, register), stream

        def tick(carry: Any, time: Array) -> tuple[Any, None]:
            inputs, stream = exchange(carry, time)
            number = (time - jax.lax.axis_index(PIPELINE)) // devices % rounds
            return (_shift(stage(layers, number, inputs), devices, 1), stream), None

        register = jax.tree.map(lambda s: jnp.zeros_like(s[0]), stream)
        ticks = number_of_ticks(devices, rounds, microbatches)
        carry, _ = jax.lax.scan(tick, (register, stream), jnp.arange(ticks))
        _, (x, _, _) = exchange(carry, jnp.asarray(ticks))
        # The first result leaves `devices` exchanges after the first microbatch entered.
        return jnp.roll(x, -devices, axis=0)[None]

    rows = jax.tree.map(
        lambda a: _to_microbatches(a, devices, microbatches),
        (x, context.segment_ids, context.rotary),
    )
    x_SMBTD = jax.shard_map(
        run,
        in_specs=(P(PIPELINE), P(PIPELINE)),
        out_specs=P(PIPELINE),
        axis_names={PIPELINE},
        # Loop carries start replicated and end varying over devices.
        check_vma=False,
    )(segments, rows)
    return _to_rows(x_SMBTD)


def _shift(tree: Any, devices: int, by: int) -> Any:
    """Return each device's values from the device `by` places before it in the ring."""
    pairs = [(d, (d + by) % devices) for d in range(devices)]
    return jax.tree.map(lambda a: jax.lax.ppermute(a, PIPELINE, pairs), tree)


def _where(condition: Array, chosen: Any, other: Any) -> Any:
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), chosen, other)


def _to_microbatches(rows: Array, stages: int, microbatches: int) -> Array:
    """Return `[B, ...]` as `[stages, microbatches / stages, rows of one, ...]`: every device keeps
    its own rows."""
    parts = _row_parts()
    split = rows.reshape(stages, parts, microbatches // stages, -1, *rows.shape[1:])
    merged = split.swapaxes(1, 2).reshape(stages, microbatches // stages, -1, *rows.shape[1:])
    return jax.lax.with_sharding_constraint(merged, P(PIPELINE, None, _OTHER_ROW_AXES, CONTEXT))


def _to_rows(microbatches: Array) -> Array:
    """Return the rows in the order that they had before `_to_microbatches`."""
    stages, count, _, *rest = microbatches.shape
    split = microbatches.reshape(stages, count, _row_parts(), -1, *rest).swapaxes(1, 2)
    return jax.lax.with_sharding_constraint(split.reshape(-1, *rest), P(ROW_AXES, CONTEXT))


def _row_parts() -> int:
    """Return the number of devices that share the rows of a microbatch."""
    mesh = jax.sharding.get_abstract_mesh()
    return math.prod(mesh.shape[axis] for axis in _OTHER_ROW_AXES)
