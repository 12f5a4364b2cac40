"""Plans: how many neurons a rate keeps, and which layers keep them."""

import itertools
import math
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sat_jax.errors import UserError
from sat_jax.nn.layout import Unit
from sat_jax.sparsity.plan import (
    LayerRates,
    Neurons,
    Plan,
    Segment,
    kept_count,
    kept_shares,
    make_plan,
)


def neurons(query_heads: int = 3) -> Neurons:
    units = (
        Unit("kv_group", 4, "attention", ()),
        Unit("query_head", query_heads, "attention", ("kv_group",)),
        Unit("channel", 96, "mlp", ()),
    )
    return Neurons(6, units)


NEURONS = neurons()
RATES = st.integers(0, 64).map(lambda k: k / 64)  # exact in binary, so that ties are real ties


def segment(start: int, stop: int, *counts: int) -> Segment:
    """`counts` of KV groups, query heads in each group, and channels."""
    names = [unit.name for unit in NEURONS.units]
    return Segment(start, stop, tuple(zip(names, counts, strict=True)))


def plan(attention: LayerRates = 0.5, mlp: LayerRates = 0.25, **rest: Any) -> Plan:
    return make_plan(NEURONS, attention, mlp, **rest)


@pytest.mark.parametrize(
    ("total", "rate", "unit", "kept"),
    [
        (1536, 0.4, 1, 922),  # 921.6
        (1536, 0.4, 128, 896),  # 7.2 runs
        (9, 0.4, 1, 5),  # 5.4
        (3, 0.4, 1, 2),  # 1.8
        (3, 0.5, 1, 2),  # 1.5: halves round up
        (3, 0.6, 1, 1),
        (8, 0.99, 1, 1),  # never less than one unit
        (8, 1.0, 2, 2),
        (8, 0.0, 2, 8),
        (64, 0.34, 16, 48),  # 2.64 runs
        (12, 0.125, 4, 12),  # 2.625 runs of 4: nearer to all than to 8
        (15, 0.9, 1, 2),  # 1.5, which binary fractions make 1.4999…
        (5, 0.8 * (1 - 1 / 8), 1, 2),  # the same: 0.7000000000000001
    ],
)
def test_kept_count_by_hand(total: int, rate: float, unit: int, kept: int) -> None:
    assert kept_count(total, rate, unit) == kept


@given(st.integers(1, 200), RATES, st.integers(1, 16))
def test_kept_count_is_the_nearest_multiple(units: int, rate: float, unit: int) -> None:
    total = units * unit
    kept = kept_count(total, rate, unit)
    share = (1 - Fraction(rate)) * total
    assert kept == max(unit, unit * math.floor(share / unit + Fraction(1, 2)))
    assert kept % unit == 0
    assert unit <= kept <= total
    assert abs(kept - share) <= Fraction(unit, 2) or kept == unit
    assert kept_count(total, 0.0, unit) == total


@given(
    fives=st.integers(1, 40),
    tenths=st.integers(0, 10),
    rungs=st.sampled_from([1, 2, 4, 5, 8]),
    unit=st.integers(1, 16),
    data=st.data(),
)
def test_kept_count_takes_rates_as_decimals(
    fives: int, tenths: int, rungs: int, unit: int, data: st.DataObject
) -> None:
    """Stair k of a ladder from r0 in floating point is that in fractions. With 5, 10, …
    neurons many rates leave a half."""
    units, stair = 5 * fives, data.draw(st.integers(0, rungs))
    rate = tenths / 10 * (1 - stair / rungs)
    exact = Fraction(tenths, 10) * (1 - Fraction(stair, rungs))
    expected = unit * math.floor((1 - exact) * units + Fraction(1, 2))
    assert kept_count(units * unit, rate, unit) == max(unit, expected)


def test_a_plan_is_one_segment_of_realised_counts() -> None:
    assert plan() == Plan((segment(0, 6, 2, 3, 72),))
    assert plan(attention_unit="query_head") == Plan((segment(0, 6, 4, 2, 72),))
    assert plan(block=8, balance=2) == Plan((segment(0, 6, 2, 3, 80),), balance=2, block=8)
    assert plan(0.9, 0.0, balance=2).segments == (segment(0, 6, 2, 3, 96),)


def test_query_heads_ignore_block_and_balance() -> None:
    balanced = plan(0.34, attention_unit="query_head", block=8, balance=4)
    assert balanced.segments[0].kept("query_head") == 2
    assert balanced.segments[0].kept("kv_group") == 4


def test_the_head_of_multi_head_attention_is_its_group() -> None:
    heads = neurons(query_heads=1)
    for rest in ({}, {"balance": 2}, {"dense_layers": (0,)}):
        grouped = make_plan(heads, 0.5, 0.25, **rest)
        assert make_plan(heads, 0.5, 0.25, attention_unit="query_head", **rest) == grouped
        assert grouped.segments[-1].kept("kv_group") == 2
    with pytest.raises(UserError, match="does not divide the 4 units 'kv_group'"):
        make_plan(heads, 0.5, 0.0, attention_unit="query_head", balance=3)


def test_only_what_is_chosen_must_be_divided() -> None:
    assert plan(attention_unit="query_head", balance=3).segments == (segment(0, 6, 4, 2, 72),)
    assert plan(attention=0.0, balance=3).segments == (segment(0, 6, 4, 3, 72),)
    assert plan(mlp=0.0, block=5).segments == (segment(0, 6, 2, 3, 96),)
    assert plan(0.0, 0.0, block=5, balance=3).segments == (segment(0, 6, 4, 3, 96),)


def test_dense_layers_are_segments_of_their_own() -> None:
    sparse, full = (2, 3, 72), (4, 3, 96)
    assert plan(dense_layers=(0, -1)).segments == (
        segment(0, 1, *full),
        segment(1, 5, *sparse),
        segment(5, 6, *full),
    )
    assert plan(dense_layers=(1, 2)).segments[1] == segment(1, 3, *full)
    assert plan(dense_layers=(-6, 0, 0)).segments == (
        segment(0, 1, *full),
        segment(1, 6, *sparse),
    )
    assert plan(dense_layers=tuple(range(6))).segments == (segment(0, 6, *full),)


def test_each_layer_may_have_rates_of_its_own() -> None:
    made = plan((0.0, 0.0, 0.5, 0.5, 0.5, 0.5), (0.25, 0.25, 0.25, 0.25, 0.25, 0.5))
    assert made.segments == (
        segment(0, 2, 4, 3, 72),
        segment(2, 5, 2, 3, 72),
        segment(5, 6, 2, 3, 48),
    )
    assert plan(0.5, (0.25,) * 6) == plan()
    # Equal counts are one segment; a dense layer is dense at any rate.
    assert plan(0.0, (0.25, 0.25, 0.2501, 0.25, 0.25, 0.25)) == plan(0.0)
    assert plan(mlp=(0.9, *(0.25,) * 5), dense_layers=(0,)) == plan(dense_layers=(0,))


@given(st.sets(st.integers(-6, 5)), RATES, RATES)
def test_segments_cover_every_layer_once(dense: set[int], attention: float, mlp: float) -> None:
    made = plan(attention, mlp, dense_layers=tuple(dense), max_segments=6)
    numbers = [layer for s in made.segments for layer in range(s.start, s.stop)]
    assert numbers == list(range(6))
    assert sum(segment.layers for segment in made.segments) == 6
    for layer in dense:
        (found,) = [s for s in made.segments if s.start <= layer % 6 < s.stop]
        assert not NEURONS.omitted(found)
    counts = [segment.counts for segment in made.segments]
    assert all(a != b for a, b in itertools.pairwise(counts))


def test_what_keeps_everything_is_dense() -> None:
    assert NEURONS.is_dense(plan(0.0, 0.0))
    assert NEURONS.is_dense(plan(0.1, 0.005))  # too small a rate for a single neuron
    assert NEURONS.is_dense(plan(dense_layers=tuple(range(6))))
    assert not NEURONS.is_dense(plan(0.5, 0.0))
    assert not NEURONS.is_dense(plan(0.5, 0.0, attention_unit="query_head"))
    assert not NEURONS.is_dense(plan(0.0, 0.5))
    assert not NEURONS.is_dense(plan(0.0, 0.5, dense_layers=(0, 1, 2, 3, 4)))
    assert [unit.name for unit in NEURONS.omitted(plan(0.5, 0.0).segments[0])] == ["kv_group"]


def test_kept_shares_are_means_over_layers() -> None:
    made = plan(0.5, (0.25,) * 3 + (0.5,) * 3, dense_layers=(0,))
    assert kept_shares(made, NEURONS) == ((1 + 5 * 0.5) / 6, (1 + 2 * 0.75 + 3 * 0.5) / 6)
    assert kept_shares(plan(0.34, 0.0, attention_unit="query_head"), NEURONS) == (2 / 3, 1)


def test_equal_plans_are_one_key() -> None:
    """One plan a rung, one compilation a plan."""
    assert len({plan(0.5, 0.25), plan(0.5, 0.2501), plan(0.5, 0.5)}) == 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"balance": 3},
            "sparsity.balance is 3, which does not divide the 4 units 'kv_group' of a layer",
        ),
        (
            {"balance": 2, "block": 32},
            "sparsity.block × sparsity.balance is 64, which does not divide the 96 units"
            " 'channel' of a layer",
        ),
        ({"dense_layers": (0, 6)}, "sparsity.dense_layers has 6; accepted: -6 to 5"),
        ({"dense_layers": (-7,)}, "sparsity.dense_layers has -7; accepted: -6 to 5"),
        (
            {"dense_layers": (0, 2, 4)},
            "sparsity: dense_layers, the rates of the layers and token_skip_rate make 6 segments;"
            " accepted: up to sparsity.max_segments = 4",
        ),
        (
            {"mlp": (0.5,) * 5},
            "sparsity: 5 rates of layers were given; accepted: one for each of the 6",
        ),
    ],
)
def test_what_cannot_be_planned_is_refused_by_name(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        plan(**settings)
    assert str(caught.value) == message


def test_max_segments_is_inclusive() -> None:
    assert len(plan(dense_layers=(0, 2, 4), max_segments=6).segments) == 6
    with pytest.raises(UserError, match="max_segments = 5"):
        plan(dense_layers=(0, 2, 4), max_segments=5)
