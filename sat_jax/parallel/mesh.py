"""The device mesh: `data` and `fsdp` split rows, `fsdp` the width of weights, `tensor` neurons."""

from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from sat_jax.config import MeshConfig
from sat_jax.errors import UserError

AXES = ("data", "fsdp", "tensor")


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh over all devices. `data = -1` takes what the other axes leave.

    Axes are `Auto`: the compiler places intermediate values. Raises `UserError` where the axes do
    not multiply to the number of devices, or `tensor` would split rows unevenly over processes.
    """
    devices = jax.devices() if devices is None else devices
    rest = config.fsdp * config.tensor
    data = len(devices) // rest if config.data == -1 else config.data
    if data * rest != len(devices):
        raise UserError(
            f"mesh data {config.data} × fsdp {config.fsdp} × tensor {config.tensor} does not fit"
            f" {len(devices)} devices; accepted: that product, or data -1, which takes the rest"
        )
    local = len(devices) // jax.process_count()
    if local % config.tensor and config.tensor % local:
        raise UserError(
            f"mesh.tensor {config.tensor} cuts through processes of {local} devices; accepted: a"
            " divisor or a multiple of that"
        )
    # Process by process, so that each one reads consecutive rows.
    ordered = sorted(devices, key=lambda device: (device.process_index, device.id))
    grid = np.asarray(ordered).reshape(data, config.fsdp, config.tensor)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def row_share(mesh: Mesh) -> tuple[int, int]:
    """(index, count): of `count` equal shares of a batch's rows, the one that this process reads.

    Processes whose devices stand in one `tensor` group read the same rows.
    """
    local = mesh.size // jax.process_count()
    together = max(mesh.shape["tensor"] // local, 1)
    return jax.process_index() // together, jax.process_count() // together
