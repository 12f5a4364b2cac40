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
from tests.tolerances import assert_close

RISES = st.lists(st.floats(-0.1, 2), min_size=4, max_size=4).map(tuple)


def measured(*rises: float, rate: float = 0.5) -> Sensitivity:
    """Blocks of two layers that suffer alike without heads and without channels."""
    borders = tuple(range(0, 2 * len(rises) + 1, 2))
    return Sensitivity(borders, rate, rate, rises, rises, "m", "wanda")


def test_rates_are_inversely_proportional_to_what_the_loss_rises_by() -> None:
    # 1 and 3: of a mean of 0.4 the robust block takes 0.6, the other 0.2.
    attention, mlp = allocate(measured(1.0, 3.0), 0.4, 0.2, max_segments=4)
    assert_close(attention, [0.6, 0.6, 0.2, 0.2], "float64", "forward")
    assert_close(mlp, [0.3, 0.3, 0.1, 0.1], "float64", "forward")


def test_equal_blocks_are_one_segment() -> None:
    assert allocate(measured(1.0, 1.0, 1.0), 0.4, 0.2, 4) == ((0.4,) * 6, (0.2,) * 6)


def test_what_is_alike_is_put_together_where_segments_are_few() -> None:
    attention, _ = allocate(measured(8.0, 1.0, 1.0, 1.0), 0.4, 0.4, max_segments=2)
    assert len(set(attention[:2])) == len(set(attention[2:])) == 1
    assert attention[0] < attention[2]


def test_no_layer_omits_nearly_everything() -> None:
    attention, _ = allocate(measured(1.0, 50.0, 50.0), 0.5, 0.5, max_segments=3)
    assert_close(attention, [0.9, 0.9, 0.3, 0.3, 0.3, 0.3], "float64", "forward")


def test_a_loss_that_does_not_rise_is_no_licence() -> None:
    attention, _ = allocate(measured(-1.0, 1.0), 0.3, 0.3, max_segments=2)
    assert 0 < attention[2] < attention[0] <= 0.9


@given(RISES, st.floats(0.05, 0.85), st.floats(0.05, 0.85), st.integers(1, 4))
def test_every_budget_is_spent(
    rises: tuple[float, ...], attention: float, mlp: float, segments: int
) -> None:
    for rates, mean in zip(
        allocate(measured(*rises), attention, mlp, segments), (attention, mlp), strict=True
    ):
        assert abs(np.mean(rates) - mean) < 1e-5
        assert all(0 <= rate <= 0.9 for rate in rates)
        assert len(list(itertools.groupby(rates))) <= segments


@given(RISES, st.floats(0.05, 0.6))
@example((0.0, 0.0, 0.0, 1e-9), 0.5)
@example((0.0, 0.0, 0.0, 5e-324), 0.5)
def test_a_budget_is_never_worse_than_equal_rates(rises: tuple[float, ...], rate: float) -> None:
    """By the law that it believes in."""
    attention, _ = allocate(measured(*rises), rate, rate, 4)
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
