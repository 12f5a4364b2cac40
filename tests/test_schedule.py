"""Schedules: every step has one rate, and the last phase is dense where it should be."""

import itertools
import math

from hypothesis import given
from hypothesis import strategies as st

from sat_jax.sparsity.schedule import Schedule, stairs
from tests.tolerances import assert_close

DENSE_AT_LAST: tuple[Schedule, ...] = ("ladder", "auto", "linear", "cosine", "cubic", "s2d")


def table(
    schedule: Schedule, steps: int, rungs: int, split: float = 0.5, dense_start: float = 0.0
) -> list[tuple]:
    return [tuple(stair) for stair in stairs(schedule, steps, rungs, split, dense_start)]


def test_ladder_by_hand() -> None:
    assert table("ladder", 16, 4) == [
        *((0, 8, 1.0), (8, 10, 0.75), (10, 12, 0.5), (12, 14, 0.25), (14, 16, 0.0))
    ]
    assert table("ladder", 10, 2, split=0.2) == [(0, 2, 1.0), (2, 6, 0.5), (6, 10, 0.0)]
    assert table("ladder", 10, 1, split=0.7) == [(0, 7, 1.0), (7, 10, 0.0)]
    assert table("ladder", 6, 2, split=0.0) == [(0, 3, 0.5), (3, 6, 0.0)]


def test_uneven_stairs_grow_towards_the_end() -> None:
    assert [stop - start for start, stop, _ in table("ladder", 23, 4)] == [12, 2, 3, 3, 3]
    assert table("ladder", 4, 4) == [(0, 2, 1.0), (2, 3, 0.5), (3, 4, 0.0)]


def test_a_ladder_too_short_for_its_rungs_still_ends_dense() -> None:
    assert table("ladder", 2, 4) == [(0, 1, 1.0), (1, 2, 0.0)]
    assert table("ladder", 10, 4, split=0.99) == [(0, 9, 1.0), (9, 10, 0.0)]
    assert table("ladder", 1, 4) == [(0, 1, 0.0)]


def test_a_dense_start_comes_before_all_schedules() -> None:
    dense = (0, 2, 0.0)
    assert table("ladder", 10, 2, 0.6, 0.2) == [dense, (2, 6, 1.0), (6, 8, 0.5), (8, 10, 0.0)]
    assert table("ladder", 10, 1, 0.2, 0.2) == [dense, (2, 10, 0.0)]
    assert table("constant", 10, 4, 0.5, 0.2) == [dense, (2, 10, 1.0)]
    assert table("s2d", 10, 4, 0.5, 0.2) == [dense, (2, 5, 1.0), (5, 10, 0.0)]
    assert table("linear", 10, 2, 0.5, 0.2) == [dense, (2, 6, 1.0), (6, 10, 0.0)]


def test_auto_is_a_ladder_until_it_sees_a_loss() -> None:
    assert table("auto", 16, 4) == table("ladder", 16, 4)


def test_constant_never_changes() -> None:
    assert table("constant", 7, 3, 0.2) == [(0, 7, 1.0)]


def test_s2d_is_one_switch() -> None:
    assert table("s2d", 10, 4, 0.3) == [(0, 3, 1.0), (3, 10, 0.0)]
    assert table("s2d", 10, 4, 0.0) == [(0, 10, 0.0)]


def test_slopes_by_hand() -> None:
    assert table("linear", 12, 4)[0] == (0, 3, 1.0)
    for schedule, scales in {
        "linear": [1, 2 / 3, 1 / 3, 0],
        "cosine": [1, 0.75, 0.25, 0],  # (1 + cos(k · 60°)) / 2
        "cubic": [1, 8 / 27, 1 / 27, 0],
    }.items():
        rows = table(schedule, 12, 4)  # type: ignore[arg-type]
        assert [row[:2] for row in rows] == [(0, 3), (3, 6), (6, 9), (9, 12)]
        assert_close([row[2] for row in rows], scales, "float64", "forward")
        assert rows[-1][2] == 0  # exactly: the last rung is the dense program


@given(
    schedule=st.sampled_from((*DENSE_AT_LAST, "constant")),
    steps=st.integers(1, 3000),
    rungs=st.integers(1, 40),
    split=st.floats(0, 1),
)
def test_every_step_has_one_stair(schedule: Schedule, steps: int, rungs: int, split: float) -> None:
    rows = stairs(schedule, steps, rungs, split)
    assert rows[0].start == 0
    assert rows[-1].stop == steps
    assert all(row.start < row.stop for row in rows)
    assert all(a.stop == b.start for a, b in itertools.pairwise(rows))
    # The rate never rises, and neighbours with equal rates are one stair.
    assert all(a.scale > b.scale for a, b in itertools.pairwise(rows))
    assert all(0 <= row.scale <= 1 for row in rows)
    if schedule in DENSE_AT_LAST and (rungs > 1 or schedule in ("ladder", "s2d")):
        assert rows[-1].scale == 0


@given(st.integers(1, 3000), st.integers(1, 40), st.floats(0, 1))
def test_stairs_of_a_ladder_are_equal_to_a_step(steps: int, rungs: int, split: float) -> None:
    rows = stairs("ladder", steps, rungs, split)
    first = rows[0].stop if rows[0].scale == 1 else 0
    assert first == min(round(split * steps), steps - 1)
    exact = (steps - first) / rungs
    for row in rows[1:] if first else rows:
        assert math.floor(exact) <= row.stop - row.start <= math.ceil(exact)
