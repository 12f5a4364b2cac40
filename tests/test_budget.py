"""A budget: one rate over layers that suffer differently from it."""

import dataclasses
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from sat_jax.errors import UserError
from sat_jax.sparsity.budget import Sensitivity, allocate, load, save
from sat_jax.sparsity.plan import Neurons, layer_units, make_plan
from tests.tolerances import assert_close

UNITS = (10**6, 10**6)  # as good as any rate
RISES = st.lists(st.floats(-0.1, 2), min_size=4, max_size=4).map(tuple)


def measured(*rises: float, rate: float = 0.5) -> Sensitivity:
    """Blocks of two layers that suffer alike without heads and without channels."""
    borders = tuple(range(0, 2 * len(rises) + 1, 2))
    return Sensitivity(borders, rate, rate, rises, rises, "m", "wanda")


def test_rates_are_inversely_proportional_to_what_the_loss_rises_by() -> None:
    # 1 and 3: of a mean of 0.4 the robust block takes 0.6, the other 0.2.
    attention, mlp = allocate(measured(1.0, 3.0), 0.4, 0.2, 4, UNITS)
    assert_close(attention, [0.6, 0.6, 0.2, 0.2], "float64", "forward")
    assert_close(mlp, [0.3, 0.3, 0.1, 0.1], "float64", "forward")


def test_equal_blocks_are_one_segment() -> None:
    assert allocate(measured(1.0, 1.0, 1.0), 0.4, 0.2, 4, UNITS) == ((0.4,) * 6, (0.2,) * 6)


def test_what_is_alike_is_put_together_where_segments_are_few() -> None:
    attention, _ = allocate(measured(8.0, 1.0, 1.0, 1.0), 0.4, 0.4, 2, UNITS)
    assert len(set(attention[:2])) == len(set(attention[2:])) == 1
    assert attention[0] < attention[2]


def test_no_layer_omits_nearly_everything() -> None:
    attention, _ = allocate(measured(1.0, 50.0, 50.0), 0.5, 0.5, 3, UNITS)
    assert_close(attention, [0.9, 0.9, 0.3, 0.3, 0.3, 0.3], "float64", "forward")


def test_a_loss_that_does_not_rise_is_no_licence() -> None:
    attention, _ = allocate(measured(-1.0, 1.0), 0.3, 0.3, 2, UNITS)
    assert 0 < attention[2] < attention[0] <= 0.9


def test_layers_omit_whole_units_that_add_up_to_the_overall_rate() -> None:
    """Of 24 units, three in each of eight layers, 0.4 is 9.6: rounded by layers it is 8, not 10."""
    alike = measured(1.0, 1.0, 1.0, 1.0)
    attention, mlp = allocate(alike, 0.4, 0.4, 4, (3, 10))
    assert sorted(attention) == [*[0.333333] * 6, *[0.666667] * 2]
    assert mlp == (0.4,) * 8
    # One run has no choice but a third or two thirds of every layer.
    attention, _ = allocate(alike, 0.4, 0.4, 1, (3, 10))
    assert attention == (0.333333,) * 8


def test_whole_units_go_to_the_layers_that_spare_them_best() -> None:
    # Best were 0.675 and 0.225, of three units 2.025 and 0.675. Asked for are 5.4 of 12 units: 2
    # and 1 in two layers each are 6, 2 and 0 are 4.
    assert allocate(measured(1.0, 3.0), 0.45, 0.45, 2, (3, 10**6))[0] == (
        *(0.666667, 0.666667, 0.333333, 0.333333),
    )
    # Asked for are 3: 1 and 0 are 2, 1 and 1 are 4. At the asked rate the loss would rise by
    # 1/9 · (3/2)² = 0.25 with the former, by 2.2/9 · (3/4)² = 0.14 with the latter.
    assert allocate(measured(1.0, 1.2), 0.25, 0.25, 2, (3, 10**6))[0] == (0.333333,) * 4


def test_a_mean_that_is_near_enough_is_worth_no_cut() -> None:
    # Two of eight layers at 0.41 would be nearer to it.
    rates = allocate(measured(1.0, 1.0, 1.0, 1.0), 0.404, 0.404, 4, (100, 100))
    assert rates == ((0.4,) * 8, (0.4,) * 8)


@pytest.mark.parametrize("rate", [0.8, 1.0])
def test_no_layer_omits_all_its_units(rate: float) -> None:
    attention, mlp = allocate(measured(1.0, 3.0), rate, rate, 2, (3, 1))
    assert (attention, mlp) == ((0.666667,) * 4, (0.0,) * 4)


@given(RISES, st.floats(0, 1), st.floats(0, 1), st.integers(1, 4), st.integers(1, 9))
def test_a_plan_has_the_rates_that_were_spread(
    rises: tuple[float, ...], attention: float, mlp: float, segments: int, groups: int
) -> None:
    neurons = Neurons(layers=8, kv_groups=groups, query_heads=2, channels=96)
    units = layer_units(neurons, attention, mlp, "kv_group", block=8, balance=1)
    rates = allocate(measured(*rises), attention, mlp, segments, units)
    plan = make_plan(neurons, *rates, block=8, max_segments=segments)
    omitted = [sum(s.layers * (groups - s.kv_groups) for s in plan.segments) / groups]
    omitted += [sum(s.layers * (96 - s.channels) for s in plan.segments) / 96]
    for rate, share in zip(rates, omitted, strict=True):
        assert_close(sum(rate), share, "float32", "forward")


@given(RISES, st.floats(0.05, 0.85), st.floats(0.05, 0.85), st.integers(1, 4))
def test_every_budget_is_spent(
    rises: tuple[float, ...], attention: float, mlp: float, segments: int
) -> None:
    for rates, mean in zip(
        allocate(measured(*rises), attention, mlp, segments, UNITS), (attention, mlp), strict=True
    ):
        assert abs(np.mean(rates) - mean) < 1e-5
        assert all(0 <= rate <= 0.9 for rate in rates)
        assert len(list(itertools.groupby(rates))) <= segments


@given(RISES, st.floats(0.05, 0.6))
@example((0.0, 0.0, 0.0, 1e-9), 0.5)
@example((0.0, 0.0, 0.0, 5e-324), 0.5)
def test_a_budget_is_never_worse_than_equal_rates(rises: tuple[float, ...], rate: float) -> None:
    """By the law that it believes in."""
    attention, _ = allocate(measured(*rises), rate, rate, 4, UNITS)
    curvature = np.repeat(np.maximum(rises, 0), 2)
    curvature = np.maximum(curvature, max(0.02 * curvature.mean(), 1e-7))
    assert (curvature * np.square(attention)).sum() <= (curvature * rate**2).sum() * (1 + 1e-4)


def test_a_calibration_is_kept_as_it_is(tmp_path: Path) -> None:
    given = measured(0.1, 0.2, -0.3)
    save(given, tmp_path / "budget.json")
    assert load(tmp_path / "budget.json", "m", "wanda") == given


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mlp": [0.1]}, "its blocks, rates and losses do not fit together"),
        ({"rate_mlp": 0.0}, "its blocks, rates and losses do not fit together"),
        ({"borders": [0, 4, 2]}, "its blocks, rates and losses do not fit together"),
        ({"model": "n"}, "a calibration with model 'n', and the run's is 'm'; make another"),
        ({"metric": "svd"}, "a calibration with metric 'svd', and the run's is 'wanda'"),
        ({"other": 1}, "no calibration: "),
        ({"rate_mlp": None}, "no calibration: "),
    ],
)
def test_other_files_are_refused(tmp_path: Path, change: dict, message: str) -> None:
    file = tmp_path / "budget.json"
    file.write_text(json.dumps(dataclasses.asdict(measured(0.1, 0.2)) | change))
    with pytest.raises(UserError) as caught:
        load(file, "m", "wanda")
    assert str(caught.value).startswith(f"sparsity.budget {file}: {message}")
    with pytest.raises(UserError, match="no calibration"):
        load(tmp_path, "m", "wanda")
