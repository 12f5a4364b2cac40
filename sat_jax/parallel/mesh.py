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
    not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    rest = config.fsdp * config.tensor
    data = len(devices) // rest if config.data == -1 else config.data
    if data * rest != len(devices):
        raise UserError(
            f"mesh data {config.data} × fsdp {config.fsdp} × tensor {config.tensor} does not fit"
            f" {len(devices)} devices"
        )
    grid = np.asarray(devices).reshape(data, config.fsdp, config.tensor)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))
