"""What one rung keeps, as static numbers: one plan, one compilation."""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Literal

from sat_jax.errors import UserError

AttentionUnit = Literal["kv_group", "query_head"]
LayerRates = float | Sequence[float]


@dataclasses.dataclass(frozen=True)
class Segment:
    """Contiguous layers `[start, stop)` that keep the same number of neurons.

    Of the layer's KV groups `kv_groups` are kept, of the query heads in each kept group
    `query_heads`, of the MLP channels `channels`. The counts are what is computed, not what was
    asked for. `forward_all`: the forward pass has the omitted neurons too, and only the backward
    pass omits them. `compensate`: something is added to the kept rows of output matrices for them.
    """

    start: int
    stop: int
    kv_groups: int
    query_heads: int
    channels: int
    forward_all: bool = False
    compensate: bool = False

    @property
    def layers(self) -> int:
        return self.stop - self.start


@dataclasses.dataclass(frozen=True)
class Plan:
    """The segments of all layers, first to last, and how neurons are chosen inside a layer.

    The same number is kept in each of `balance` contiguous parts of the neurons, and channels are
    kept in aligned runs of `block`. Hashable; static under jit.
    """

    segments: tuple[Segment, ...]
    balance: int = 1
    block: int = 1


@dataclasses.dataclass(frozen=True)
class Neurons:
    """How many neurons every layer of the whole model has."""

    layers: int
    kv_groups: int
    query_heads: int
    channels: int

    def heads_whole(self, segment: Segment) -> bool:
        """Whether the segment keeps every head."""
        return (segment.kv_groups, segment.query_heads) == (self.kv_groups, self.query_heads)

    def channels_whole(self, segment: Segment) -> bool:
        """Whether the segment keeps every channel."""
        return segment.channels == self.channels

    def is_dense(self, plan: Plan) -> bool:
        """Whether the plan keeps everything."""
        return all(self.heads_whole(s) and self.channels_whole(s) for s in plan.segments)


def kept_count(total: int, rate: float, unit: int = 1) -> int:
    """Neurons kept of `total` at omission rate `rate`: the nearest multiple of `unit`, at least one
    unit; halves round up. At rate 0 all, whatever the unit."""
    if rate == 0:
        return total
    # Rates are decimals: 1 - 0.9 of 15 is 1.5, though binary fractions make it a little less.
    units = round((1 - rate) * total / unit, 9)
    return max(unit, unit * math.floor(units + 0.5))


def make_plan(
    neurons: Neurons,
    rate_attention: LayerRates,
    rate_mlp: LayerRates,
    *,
    attention_unit: AttentionUnit = "kv_group",
    dense_layers: tuple[int, ...] = (),
    max_segments: int = 4,
    block: int = 1,
    balance: int = 1,
    forward_all: bool = False,
    compensate: bool = False,
) -> Plan:
    """The counts that come nearest to the asked rates, one for all layers or one for each.

    Where a group has one query head (multi-head attention) the two attention units are the same,
    and chosen as groups are. `dense_layers` keep everything (negative numbers count from the end).
    Raises `UserError` for neurons that are chosen and that `block` and `balance` do not divide, a
    layer that does not exist, and more than `max_segments` runs of layers.
    """
    by_group = attention_unit == "kv_group" or neurons.query_heads == 1
    dense = _layer_numbers(dense_layers, neurons.layers)
    heads, channels = (
        [0.0 if layer in dense else rate for layer, rate in enumerate(rates)]
        for rates in (_by_layer(rate_attention, neurons), _by_layer(rate_mlp, neurons))
    )
    if any(heads) and by_group:
        _check_divides("sparsity.balance", balance, "KV groups", neurons.kv_groups)
    if any(channels):
        unit = block * balance
        _check_divides("sparsity.block × sparsity.balance", unit, "channels", neurons.channels)
    counts = [
        (
            kept_count(neurons.kv_groups, h if by_group else 0.0, balance),
            kept_count(neurons.query_heads, 0.0 if by_group else h),
            kept_count(neurons.channels, c, block * balance),
        )
        for h, c in zip(heads, channels, strict=True)
    ]
    whole = (neurons.kv_groups, neurons.query_heads, neurons.channels)
    segments = tuple(
        Segment(
            start,
            stop,
            *counts[start],
            forward_all=forward_all and counts[start] != whole,
            compensate=compensate and counts[start] != whole,
        )
        for start, stop in _runs(counts)
    )
    if len(segments) > max_segments:
        raise UserError(
            f"sparsity: dense_layers and the rates of the layers cut them into {len(segments)}"
            f" segments; accepted: up to sparsity.max_segments = {max_segments}"
        )
    return Plan(segments, balance, block)


def _by_layer(rates: LayerRates, neurons: Neurons) -> Sequence[float]:
    if isinstance(rates, Sequence):
        if len(rates) != neurons.layers:
            raise UserError(
                f"sparsity: {len(rates)} rates of layers were given; accepted: one for each of the"
                f" {neurons.layers}"
            )
        return rates
    return [rates] * neurons.layers


def _check_divides(name: str, unit: int, what: str, total: int) -> None:
    if total % unit:
        raise UserError(f"{name} is {unit}, which does not divide the {total} {what} of a layer")


def _layer_numbers(asked: tuple[int, ...], layers: int) -> set[int]:
    for layer in asked:
        if not -layers <= layer < layers:
            raise UserError(
                f"sparsity.dense_layers has {layer}; accepted: {-layers} to {layers - 1}"
            )
    return {layer % layers for layer in asked}


def _runs(counts: list[tuple[int, int, int]]) -> Iterator[tuple[int, int]]:
    """(start, stop) of each run of equal counts."""
    start = 0
    for i in range(1, len(counts) + 1):
        if i == len(counts) or counts[i] != counts[start]:
            yield start, i
            start = i
