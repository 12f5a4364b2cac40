"""What one rung keeps, as static numbers: one plan, one compilation."""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any, Literal

from sat_jax.errors import UserError
from sat_jax.nn.layout import Layout, Unit
from sat_jax.nn.param import CHANNEL
from sat_jax.sparsity.block_patterns import BlockCounts

Stored = tuple[tuple[str, BlockCounts], ...]
"""Matrices of which blocks alone are stored, by path."""
Dropped = tuple[tuple[str, tuple[float, ...]], ...]
"""Probabilities of each layer, by branch."""
AttentionUnit = Literal["kv_group", "query_head"]
Passes = Literal["all", "backward", "weights"]
"""What a step omits of omitted units: forward and backward pass; the backward pass alone (gradients
of their inputs and weights); or the gradients of their weights alone."""
LayerRates = float | Sequence[float]


@dataclasses.dataclass(frozen=True)
class Segment:
    """Contiguous layers `[start, stop)` that keep the same numbers of units, and in a pipeline with
    several stages on each device are one round.

    `counts`: (unit, kept) for every unit of the model, within one unit of those around it. The
    counts are what is computed, not what was asked for. `token_skip_rate`: share of the tokens of a
    row that skip the layers.
    """

    start: int
    stop: int
    counts: tuple[tuple[str, int], ...]
    token_skip_rate: float = 0.0

    @property
    def layers(self) -> int:
        """How many layers the segment has."""
        return self.stop - self.start

    def kept(self, unit: str) -> int:
        """Return how many units of this name are kept, within one unit of those around it."""
        return dict(self.counts)[unit]

    def tokens(self, row_length: int) -> int:
        """Return how many tokens of a row a layer processes."""
        return kept_count(row_length, self.token_skip_rate)


@dataclasses.dataclass(frozen=True)
class Plan:
    """The segments of all layers, first to last, and how units are chosen inside a layer.

    The same number is kept in each of `balance` contiguous parts of the units, and channels are
    kept in aligned runs of `block`. `stored`: block-sparse matrices, the same in all layers.
    `dropped`: how likely a step is to leave out the backward pass of a branch, by layer.
    `token_rate`: share of the tokens that weight gradients leave out.
    Hashable; static under jit.
    """

    segments: tuple[Segment, ...]
    balance: int = 1
    block: int = 1
    stored: Stored = ()
    dropped: Dropped = ()
    token_rate: float = 0.0

    @property
    def token_skip_rate(self) -> float:
        """Share of the tokens of a row that skip a layer, in layers that tokens skip."""
        return max(segment.token_skip_rate for segment in self.segments)

    @property
    def dropped_share(self) -> float:
        """Mean share of the backward passes of branches that steps leave out."""
        rates = [rate for _, rates in self.dropped for rate in rates]
        return sum(rates) / len(rates) if rates else 0.0

    @property
    def stored_share(self) -> float:
        """Share of the blocks of block-sparse matrices that are stored; 1 without these."""
        blocks = sum(math.prod(counts.grid) for _, counts in self.stored)
        return sum(counts.nonzero for _, counts in self.stored) / blocks if blocks else 1.0


@dataclasses.dataclass(frozen=True)
class Neurons:
    """The units that every layer of a model has, by branch and outermost first."""

    layers: int
    units: tuple[Unit, ...]

    @property
    def branches(self) -> dict[str, tuple[Unit, ...]]:
        """The units of each branch, outermost first."""
        names = dict.fromkeys(unit.branch for unit in self.units)
        return {name: tuple(u for u in self.units if u.branch == name) for name in names}

    def size(self, unit: str) -> int:
        """Return how many units of this name there are within one unit of those around them."""
        return next(u.size for u in self.units if u.name == unit)

    def omitted(self, segment: Segment) -> tuple[Unit, ...]:
        """Return the units of which the segment keeps fewer than all."""
        return tuple(u for u in self.units if segment.kept(u.name) < u.size)

    def is_dense(self, plan: Plan) -> bool:
        """Whether the plan keeps all units, stores all blocks, has all backward passes, and every
        layer processes all tokens."""
        omits = plan.stored or plan.dropped or plan.token_rate or plan.token_skip_rate
        return not omits and self.keeps_all(plan)

    def keeps_all(self, plan: Plan) -> bool:
        """Whether the plan keeps all units."""
        return not any(self.omitted(segment) for segment in plan.segments)

    def dense_segment(self) -> Segment:
        """Return the segment of all layers in which everything is kept."""
        return Segment(0, self.layers, tuple((u.name, u.size) for u in self.units))

    def kept_share(self, segment: Segment, branch: str) -> float:
        """Return the share of the branch's innermost units that a layer of the segment keeps."""
        units = self.branches[branch]
        return math.prod(segment.kept(u.name) / u.size for u in units)


def has_channels(units: Sequence[Unit]) -> bool:
    """Whether the units are those of an MLP."""
    return units[0].name == CHANNEL


def neurons_of(layout: Layout[Any]) -> Neurons:
    """Return the units of a model."""
    return Neurons(layout.layers, tuple(layout.units.values()))


def kept_count(total: int, rate: float, unit: int = 1) -> int:
    """Return how many of `total` are kept at omission rate `rate`: the nearest multiple of `unit`,
    at least one unit; halves round up. At rate 0 all, whatever the unit."""
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
    rounds: int = 1,
    token_skip_rate: float = 0.0,
) -> Plan:
    """Return the counts nearest to the asked rates, one for all layers or one for each.

    `rate_attention` is of the units of every branch but MLPs: `attention_unit` where a branch has
    nested ones. Where each group has one query head (multi-head attention) the two attention units
    are the same, and chosen as groups are. `dense_layers` keep everything (negative numbers count
    from the end). Tokens skip the other layers at the rate `token_skip_rate`, but not the first and
    the last one. If all layers keep the same numbers, they are split into `rounds` equal segments.
    Raises `UserError` for an `attention_unit` other than the default in a model without it, chosen
    units that `block` and `balance` do not divide, a layer that does not exist, more than
    `max_segments` runs of layers, and a `token_skip_rate` without a layer to skip.
    """
    names = [unit.name for unit in neurons.units]
    if attention_unit not in ("kv_group", *names):
        raise UserError(
            f"sparsity.attention_unit {attention_unit!r}: the units of this model are"
            f" {', '.join(names)}; accepted: the default 'kv_group', which changes nothing here"
        )
    dense = _layer_numbers(dense_layers, neurons.layers)
    attention_rates, mlp_rates = (
        [0.0 if layer in dense else rate for layer, rate in enumerate(rates)]
        for rates in (by_layer(rate_attention, neurons), by_layer(rate_mlp, neurons))
    )
    counts: list[dict[str, int]] = [{} for _ in range(neurons.layers)]
    for units in neurons.branches.values():
        is_mlp = has_channels(units)
        rates = mlp_rates if is_mlp else attention_rates
        chosen = units[0] if is_mlp else _attention_unit(units, attention_unit)
        multiple = balance * (block if is_mlp else 1) if chosen is units[0] else 1
        if any(rates) and chosen.size % multiple:
            name = "sparsity.block × sparsity.balance" if is_mlp else "sparsity.balance"
            raise UserError(
                f"{name} is {multiple}, which does not divide the {chosen.size} units"
                f" {chosen.name!r} of a layer"
            )
        for layer, rate in enumerate(rates):
            for unit in units:
                asked = rate if unit is chosen else 0.0
                counts[layer][unit.name] = kept_count(unit.size, asked, multiple)
    skipped = set(range(1, neurons.layers - 1)) - dense
    if token_skip_rate > 0 and not skipped:
        raise UserError(
            f"sparsity.token_skip_rate {token_skip_rate:g}: tokens can skip none of the"
            f" {neurons.layers} layers; accepted: 0, or a layer between the first and the last one"
            " that is not in sparsity.dense_layers"
        )
    ordered = [
        (
            tuple((unit.name, kept[unit.name]) for unit in neurons.units),
            token_skip_rate if layer in skipped else 0.0,
        )
        for layer, kept in enumerate(counts)
    ]
    segments = tuple(Segment(start, stop, *ordered[start]) for start, stop in _runs(ordered))
    if len(segments) > max_segments:
        raise UserError(
            "sparsity: dense_layers, the rates of the layers and token_skip_rate make"
            f" {len(segments)} segments; accepted: up to sparsity.max_segments = {max_segments}"
        )
    if len(segments) == 1:
        size = neurons.layers // rounds
        segments = tuple(Segment(r * size, (r + 1) * size, *ordered[0]) for r in range(rounds))
    return Plan(segments, balance, block)


def kept_shares(plan: Plan, neurons: Neurons) -> tuple[float, float]:
    """Return the realised shares of all heads (units of all branches but MLPs) and of all
    channels, each the mean over layers."""
    shares: dict[bool, list[float]] = {True: [], False: []}
    for name, units in neurons.branches.items():
        kept = sum(s.layers * neurons.kept_share(s, name) for s in plan.segments)
        shares[has_channels(units)].append(kept / neurons.layers)
    heads, channels = (sum(shares[key]) / len(shares[key]) for key in (False, True))
    return heads, channels


def _attention_unit(units: tuple[Unit, ...], asked: AttentionUnit) -> Unit:
    outer, inner = units[0], units[-1]
    return outer if asked == outer.name or inner.size == 1 else inner


def by_layer(rates: LayerRates, neurons: Neurons) -> Sequence[float]:
    """Return the rate of each layer. Raises `UserError` for another number of rates."""
    if isinstance(rates, Sequence):
        if len(rates) != neurons.layers:
            raise UserError(
                f"sparsity: {len(rates)} rates of layers were given; accepted: one for each of the"
                f" {neurons.layers}"
            )
        return rates
    return [rates] * neurons.layers


def _layer_numbers(asked: tuple[int, ...], layers: int) -> set[int]:
    for layer in asked:
        if not -layers <= layer < layers:
            raise UserError(
                f"sparsity.dense_layers has {layer}; accepted: {-layers} to {layers - 1}"
            )
    return {layer % layers for layer in asked}


def _runs(counts: Sequence[Any]) -> Iterator[tuple[int, int]]:
    """Yield (start, stop) of each run of equal counts."""
    start = 0
    for i in range(1, len(counts) + 1):
        if i == len(counts) or counts[i] != counts[start]:
            yield start, i
            start = i
