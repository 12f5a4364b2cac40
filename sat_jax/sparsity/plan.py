"""What one rung keeps, as static numbers: one plan, one compilation."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Segment:
    """Contiguous layers `[start, stop)` that keep the same number of neurons.

    Of the layer's KV groups `kv_groups` are kept, of the query heads in each kept group
    `query_heads`, of the MLP channels `channels`. The counts are what is computed, not what was
    asked for.
    """

    start: int
    stop: int
    kv_groups: int
    query_heads: int
    channels: int

    @property
    def layers(self) -> int:
        return self.stop - self.start


@dataclasses.dataclass(frozen=True)
class Plan:
    """The segments of all layers, first to last. Hashable; static under jit."""

    segments: tuple[Segment, ...]
