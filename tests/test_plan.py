"""Plans: how many neurons a rate keeps, and which layers keep them."""

import dataclasses
import itertools
import math
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sat_jax.errors import UserError
from sat_jax.sparsity.plan import LayerRates, Neurons, Plan, Segment, kept_count, make_plan

NEURONS = Neurons(layers=6, kv_groups=4, query_heads=3, channels=96)
RATES = st.integers(0, 64).map(lambda k: k / 64)  # exact in binary, so that ties are real ties


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
    """Stair k of a ladder from r0, in floating point, against the same in fractions. Of 5, 10, …
    neurons many rates leave a half."""
    units, stair = 5 * fives, data.draw(st.integers(0, rungs))
    rate = tenths / 10 * (1 - stair / rungs)
    exact = Fraction(tenths, 10) * (1 - Fraction(stair, rungs))
    expected = unit * math.floor((1 - exact) * units + Fraction(1, 2))
    assert kept_count(units * unit, rate, unit) == max(unit, expected)


def test_a_plan_is_one_segment_of_realised_counts() -> None:
    assert plan() == Plan((Segment(0, 6, 2, 3, 72),))
    assert plan(attention_unit="query_head") == Plan((Segment(0, 6, 4, 2, 72),))
    assert plan(block=8, balance=2) == Plan((Segment(0, 6, 2, 3, 80),), balance=2, block=8)
    assert plan(0.9, 0.0, balance=2).segments == (Segment(0, 6, 2, 3, 96),)


def test_query_heads_ignore_block_and_balance() -> None:
    balanced = plan(0.34, attention_unit="query_head", block=8, balance=4)
    assert balanced.segments[0].query_heads == 2
    assert balanced.segments[0].kv_groups == 4


def test_the_head_of_multi_head_attention_is_its_group() -> None:
    heads = dataclasses.replace(NEURONS, query_heads=1)
    for rest in ({}, {"balance": 2}, {"dense_layers": (0,)}):
        grouped = make_plan(heads, 0.5, 0.25, **rest)
        assert make_plan(heads, 0.5, 0.25, attention_unit="query_head", **rest) == grouped
        assert grouped.segments[-1].kv_groups == 2
    with pytest.raises(UserError, match="does not divide the 4 KV groups"):
        make_plan(heads, 0.5, 0.0, attention_unit="query_head", balance=3)


def test_only_what_is_chosen_must_be_divided() -> None:
    assert plan(attention_unit="query_head", balance=3).segments == (Segment(0, 6, 4, 2, 72),)
    assert plan(attention=0.0, balance=3).segments == (Segment(0, 6, 4, 3, 72),)
    assert plan(mlp=0.0, block=5).segments == (Segment(0, 6, 2, 3, 96),)
    assert plan(0.0, 0.0, block=5, balance=3).segments == (Segment(0, 6, 4, 3, 96),)


def test_dense_layers_cut_segments() -> None:
    sparse, whole = (2, 3, 72), (4, 3, 96)
    assert plan(dense_layers=(0, -1)).segments == (
        Segment(0, 1, *whole),
        Segment(1, 5, *sparse),
        Segment(5, 6, *whole),
    )
    assert plan(dense_layers=(1, 2)).segments[1] == Segment(1, 3, *whole)
    assert plan(dense_layers=(-6, 0, 0)).segments == (
        Segment(0, 1, *whole),
        Segment(1, 6, *sparse),
    )
    assert plan(dense_layers=tuple(range(6))).segments == (Segment(0, 6, *whole),)


def test_each_layer_may_have_rates_of_its_own() -> None:
    made = plan((0.0, 0.0, 0.5, 0.5, 0.5, 0.5), (0.25, 0.25, 0.25, 0.25, 0.25, 0.5))
    assert made.segments == (
        Segment(0, 2, 4, 3, 72),
        Segment(2, 5, 2, 3, 72),
        Segment(5, 6, 2, 3, 48),
    )
    assert plan(0.5, (0.25,) * 6) == plan()
    # Rates that need no other counts need no segment; a dense layer is dense whatever its rate.
    assert plan(0.0, (0.25, 0.25, 0.2501, 0.25, 0.25, 0.25)) == plan(0.0)
    assert plan(mlp=(0.9, *(0.25,) * 5), dense_layers=(0,)) == plan(dense_layers=(0,))


@pytest.mark.parametrize("setting", ["forward_all", "compensate"])
def test_only_segments_that_omit_something_are_marked(setting: str) -> None:
    made = plan(dense_layers=(0,), **{setting: True})
    assert [getattr(segment, setting) for segment in made.segments] == [False, True]
    assert plan(0.0, 0.001, **{setting: True}) == plan(0.0, 0.0)


@given(st.sets(st.integers(-6, 5)), RATES, RATES)
def test_segments_cover_every_layer_once(dense: set[int], attention: float, mlp: float) -> None:
    made = plan(attention, mlp, dense_layers=tuple(dense), max_segments=6)
    numbers = [layer for s in made.segments for layer in range(s.start, s.stop)]
    assert numbers == list(range(6))
    assert sum(segment.layers for segment in made.segments) == 6
    for layer in dense:
        (segment,) = [s for s in made.segments if s.start <= layer % 6 < s.stop]
        assert NEURONS.heads_whole(segment)
        assert NEURONS.channels_whole(segment)
    counts = [dataclasses.astuple(segment)[2:] for segment in made.segments]
    assert all(a != b for a, b in itertools.pairwise(counts))


def test_what_keeps_everything_is_dense() -> None:
    assert NEURONS.is_dense(plan(0.0, 0.0))
    assert NEURONS.is_dense(plan(0.1, 0.005))  # too small a rate for whole neurons
    assert NEURONS.is_dense(plan(dense_layers=tuple(range(6))))
    assert not NEURONS.is_dense(plan(0.5, 0.0))
    assert not NEURONS.is_dense(plan(0.5, 0.0, attention_unit="query_head"))
    assert not NEURONS.is_dense(plan(0.0, 0.5))
    assert not NEURONS.is_dense(plan(0.0, 0.5, dense_layers=(0, 1, 2, 3, 4)))
    segment = plan(0.5, 0.0).segments[0]
    assert (NEURONS.heads_whole(segment), NEURONS.channels_whole(segment)) == (False, True)


def test_equal_plans_are_one_key() -> None:
    """One plan a rung, one compilation a plan."""
    assert len({plan(0.5, 0.25), plan(0.5, 0.2501), plan(0.5, 0.5)}) == 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"balance": 3}, "sparsity.balance is 3, which does not divide the 4 KV groups of a layer"),
        (
            {"balance": 2, "block": 32},
            "sparsity.block × sparsity.balance is 64, which does not divide the 96 channels of a"
            " layer",
        ),
        ({"dense_layers": (0, 6)}, "sparsity.dense_layers has 6; accepted: -6 to 5"),
        ({"dense_layers": (-7,)}, "sparsity.dense_layers has -7; accepted: -6 to 5"),
        (
            {"dense_layers": (0, 2, 4)},
            "sparsity: dense_layers and the rates of the layers cut them into 6 segments; accepted:"
            " up to sparsity.max_segments = 4",
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
