"""Sizes of tiles: settings that change how fast a kernel is, never what it computes.

The defaults come from arithmetic. `tuned` has those that were measured on a device.
"""

import dataclasses


class Misfit(ValueError):
    """Tiles that the registers or the memory of a processor do not hold."""


@dataclasses.dataclass(frozen=True)
class GpuTiles:
    """Of the loops for Hopper. Sizes are elements, and multiples of 64.

    tall: tokens of one warpgroup's tile, shared out among the pairs of operands of one product.
    factor: of the axis that is summed over, a step; tokens, where products are sampled.
    result: columns of a result, where no block gives them.
    stages: steps at most whose tiles are in shared memory at once.
    snake: tiles of tokens that are worked on side by side, so that L2 holds their x.
    """

    tall: int = 128
    factor: int = 64
    result: int = 128
    stages: int = 4
    snake: int = 8


@dataclasses.dataclass(frozen=True)
class TpuTiles:
    """Of the loops for TPU. Sizes are bytes of a tile's row or column, whatever the dtype.

    row: of an axis that no block cuts, so that at Llama's widths (4,096 and 5,120 bfloat16) one
      tile spans it: a tile of x is then read once for all results.
    tokens: of products. With 512 tokens (bfloat16) a step does 475 FLOPs for each byte that it
      reads.
    sampled: tokens that are summed over at once, where products are sampled.
    """

    row: int = 10_240
    tokens: int = 1_024
    sampled: int = 4_096


Tiles = GpuTiles | TpuTiles
DEFAULTS: dict[str, Tiles] = {"pallas_gpu": GpuTiles(), "pallas_tpu": TpuTiles()}
