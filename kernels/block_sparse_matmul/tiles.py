"""Tile sizes: settings that change the speed of a kernel and not its result.

The defaults were derived by arithmetic. `tuned` returns those that were measured on a device.
"""

import dataclasses


class UnsupportedTiles(ValueError):
    """Raised for tiles that do not fit the registers or the memory of a processor."""


@dataclasses.dataclass(frozen=True)
class GpuTiles:
    """Tile sizes of the kernels for Hopper, in elements; multiples of 64.

    tile_m: tokens per warpgroup, divided by the number of weight matrices of the product.
    tile_k: elements per step of the axis that is summed over. Sampled products sum over tokens.
    tile_n: columns of a result tile, where no block of the pattern determines them.
    stages: maximum number of steps whose tiles are in shared memory at the same time.
    grid_tile_width: token tiles that are processed side by side, so that their x stays in L2.
    """

    tile_m: int = 128
    tile_k: int = 64
    tile_n: int = 128
    stages: int = 4
    grid_tile_width: int = 8


@dataclasses.dataclass(frozen=True)
class TpuTiles:
    """Tile sizes of the kernels for TPU, in bytes of one row or column, for every dtype.

    row_bytes: of an axis that is not divided into blocks. At Llama's widths (4,096 and 5,120 in
      bfloat16) one tile spans the axis: a tile of x is then read once for all results.
    token_bytes: of the token axis. With 512 tokens (bfloat16) a step computes 475 FLOPs per byte.
    sampled_bytes: of the token axis of sampled products, which sum over it.
    """

    row_bytes: int = 10_240
    token_bytes: int = 1_024
    sampled_bytes: int = 4_096


Tiles = GpuTiles | TpuTiles
DEFAULTS: dict[str, Tiles] = {"pallas_gpu": GpuTiles(), "pallas_tpu": TpuTiles()}
