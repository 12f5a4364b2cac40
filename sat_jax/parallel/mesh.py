"""The device mesh: `pipeline` splits layers and rows, `data` and `fsdp` rows, `fsdp` the embedding
axis, `tensor` neurons."""

from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from sat_jax.config import MeshConfig
from sat_jax.errors import UserError

AXES = ("pipeline", "data", "fsdp", "tensor")


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Return the mesh over all devices. `data = -1` is the number that the other axes leave.

    Axes are `Auto`: the compiler shards intermediate values. Raises `UserError` if the product of
    the axes is not the number of devices, or `tensor` splits rows unevenly over processes.
    """
    devices = jax.devices() if devices is None else devices
    parts = config.pipeline * config.fsdp * config.tensor
    data = len(devices) // parts if config.data == -1 else config.data
    if data * parts != len(devices):
        raise UserError(
            f"mesh pipeline {config.pipeline} × data {config.data} × fsdp {config.fsdp} × tensor"
            f" {config.tensor} does not fit {len(devices)} devices; accepted: axes with that"
            " product, or data -1"
        )
    local = len(devices) // jax.process_count()
    if local % config.tensor and config.tensor % local:
        raise UserError(
            f"mesh.tensor is {config.tensor}, and each process has {local} devices; accepted: a"
            " divisor or a multiple of that number"
        )
    # Ordered by process, so that each process reads consecutive rows.
    ordered = sorted(devices, key=lambda device: (device.process_index, device.id))
    grid = np.asarray(ordered).reshape(config.pipeline, data, config.fsdp, config.tensor)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def row_share(mesh: Mesh) -> tuple[int, int]:
    """Return (index, count): this process reads share `index` of `count` equal shares of the rows.

    Processes whose devices are in one `tensor` group read the same rows.
    """
    local = mesh.size // jax.process_count()
    readers = max(mesh.shape["tensor"] // local, 1)  # processes that read the same rows
    return jax.process_index() // readers, jax.process_count() // readers
