"""The device mesh: `pipeline` splits layers and rows, `data` and `fsdp` rows, `context` the tokens
of a row, `fsdp` and `context` the embedding axis, `tensor` neurons."""

from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from sat_jax.config import MeshConfig
from sat_jax.errors import UserError

AXES = ("pipeline", "data", "fsdp", "context", "tensor")


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Return the mesh over all devices. `data = -1` is the number that the other axes leave.

    Axes are `Auto`: the compiler shards intermediate values. Raises `UserError` if the product of
    the axes is not the number of devices, or `context` and `tensor` split rows unevenly over
    processes.
    """
    devices = jax.devices() if devices is None else devices
    shared = config.context * config.tensor  # devices with the same rows
    parts = config.pipeline * config.fsdp * shared
    data = len(devices) // parts if config.data == -1 else config.data
    if data * parts != len(devices):
        raise UserError(
            f"mesh pipeline {config.pipeline} × data {config.data} × fsdp {config.fsdp} × context"
            f" {config.context} × tensor {config.tensor} does not fit {len(devices)} devices;"
            " accepted: axes with that product, or data -1"
        )
    local = len(devices) // jax.process_count()
    if local % shared and shared % local:
        raise UserError(
            f"mesh.context × mesh.tensor is {shared}, and each process has {local} devices;"
            " accepted: a divisor or a multiple of that number"
        )
    # Ordered by process, so that each process reads consecutive rows.
    ordered = sorted(devices, key=lambda device: (device.process_index, device.id))
    sizes = (config.pipeline, data, config.fsdp, config.context, config.tensor)
    grid = np.asarray(ordered).reshape(sizes)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def row_share(mesh: Mesh) -> tuple[int, int]:
    """Return (index, count): this process reads share `index` of `count` equal shares of the rows.

    Processes whose devices are in one group of `context` and `tensor` read the same rows.
    """
    local = mesh.size // jax.process_count()
    shared = mesh.shape["context"] * mesh.shape["tensor"]
    readers = max(shared // local, 1)  # processes that read the same rows
    return jax.process_index() // readers, jax.process_count() // readers
