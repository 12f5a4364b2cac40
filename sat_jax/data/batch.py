"""The arrays of a batch. Imports nothing of the data pipeline."""

from typing import Any, NamedTuple

from jaxtyping import Bool, Int


class Batch(NamedTuple):
    """Packed rows as the model reads them: numpy arrays, JAX arrays, or their shapes.

    Padding has segment 0, token 0, target 0 and no loss.
    """

    tokens: Int[Any, "B T"]
    targets: Int[Any, "B T"]  # the token that follows each input
    segment_ids: Int[Any, "B T"]  # 1, 2, ... along a row
    positions: Int[Any, "B T"]  # 0, 1, ... along a segment
    loss_mask: Bool[Any, "B T"]
