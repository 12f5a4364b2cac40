"""Selection: which neurons are kept, given their scores."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sat_jax.sparsity.selection import Selection, select

NAN, INF = float("nan"), float("inf")
jitted = jax.jit(select, static_argnames=("keep", "selection", "balance", "block"))


KEY = jax.random.key(0)


def kept(scores: Any, keep: int, **rest: Any) -> list[Any]:
    return np.asarray(jitted(jnp.asarray(scores, jnp.float32), keep, key=KEY, **rest)).tolist()


@pytest.mark.parametrize(
    ("scores", "keep", "rest", "expected"),
    [
        ([3.0, 1.0, 4.0, 1.0, 5.0], 3, {}, [0, 2, 4]),
        ([0.0, 7.0, 7.0, 7.0], 2, {}, [1, 2]),  # a tie: the lower index
        ([NAN, 0.0, NAN, -1.0], 2, {}, [1, 3]),  # NaN is below everything
        ([NAN, INF, 1.0], 1, {}, [1]),
        ([5.0, 4.0, 3.0, 2.0], 0, {}, []),
        ([5.0, 4.0, 3.0], 3, {}, [0, 1, 2]),
        # The same number in each part, though the best three are all in the first.
        ([9.0, 8.0, 7.0, 1.0, 3.0, 2.0], 2, {"balance": 2}, [0, 4]),
        ([9.0, 8.0, 7.0, 1.0, 3.0, 2.0], 4, {"balance": 2}, [0, 1, 4, 5]),
        # Runs of two, by the sum of their scores: 5, 6, 4, 1.
        ([5.0, 0.0, 3.0, 3.0, 2.0, 2.0, 1.0, 0.0], 2, {"block": 2}, [2, 3]),
        ([5.0, 0.0, 3.0, 3.0, 2.0, 2.0, 1.0, 0.0], 4, {"block": 2}, [0, 1, 2, 3]),
        # Both: one run in each part.
        ([5.0, 0.0, 3.0, 3.0, 1.0, 2.0, 1.0, 9.0], 4, {"block": 2, "balance": 2}, [2, 3, 6, 7]),
        # A run with a NaN is ranked last, even if it has an infinite score.
        ([9.0, NAN, 1.0, 1.0], 2, {"block": 2}, [2, 3]),
        ([INF, NAN, 1.0, 1.0], 2, {"block": 2}, [2, 3]),
    ],
)
def test_topk_by_hand(
    scores: list[float], keep: int, rest: dict[str, int], expected: list[int]
) -> None:
    assert kept(scores, keep, **rest) == expected


def test_leading_axes_are_selected_apart() -> None:
    scores = jnp.asarray([[[1.0, 2.0], [4.0, 3.0]], [[0.0, 0.0], [NAN, 1.0]]])
    assert kept(scores, 1) == [[[1], [0]], [[0], [1]]]
    assert kept([[1.0, 2.0, 4.0, 3.0], [4.0, 3.0, 1.0, 2.0]], 2, balance=2) == [[1, 2], [0, 3]]


# (N, K, balance, block). Few, since every shape is compiled; hypothesis varies the values.
SHAPES = ((5, 2, 1, 1), (12, 0, 2, 1), (12, 12, 2, 2), (12, 6, 3, 1), (16, 8, 1, 4), (16, 8, 2, 2))


@settings(max_examples=40)
@given(st.sampled_from(SHAPES), st.sampled_from(["topk", "sample"]), st.integers(0, 2**31))
def test_kept_indices_are_sorted_unique_aligned_and_balanced(
    shape: tuple[int, int, int, int], selection: Selection, seed: int
) -> None:
    total, keep, balance, block = shape
    order = np.random.default_rng(seed).permutation(2 * total)  # no ties
    scores = order.reshape(2, total).astype(np.float32)
    indices = jitted(
        jnp.asarray(scores),
        keep,
        selection=selection,
        key=jax.random.key(seed),
        balance=balance,
        block=block,
    )
    assert indices.shape == (2, keep)
    assert indices.dtype == jnp.int32
    for row, row_scores in zip(np.asarray(indices), scores, strict=True):
        assert sorted(set(row.tolist())) == row.tolist()
        runs = row.reshape(-1, block)
        assert (runs[:, 0] % block == 0).all()
        assert (np.diff(runs, axis=1) == 1).all()
        parts = row // (len(row_scores) // balance)
        assert np.bincount(parts, minlength=balance).tolist() == [keep // balance] * balance
        if selection == "topk":
            mask = np.isin(np.arange(len(row_scores)), row)
            sums = row_scores.reshape(balance, -1, block).sum(-1)
            mask = mask.reshape(balance, -1, block)[..., 0]
            for part_sums, part_mask in zip(sums, mask, strict=True):
                lowest = part_sums[part_mask].min(initial=np.inf)
                assert lowest >= part_sums[~part_mask].max(initial=-np.inf)


@settings(max_examples=30)
@given(st.permutations(range(9)), st.sampled_from([0, 1, 4, 9]), st.integers(0, 2**31))
def test_shuffled_neurons_are_selected_alike(order: list[int], keep: int, seed: int) -> None:
    scores = np.random.default_rng(seed).permutation(9).astype(np.float32)
    plain, shuffled = kept(scores, keep), kept(scores[order], keep)
    assert sorted(order[i] for i in shuffled) == plain


def test_selection_is_jitted_with_a_static_count() -> None:
    scores = jax.random.uniform(jax.random.key(0), (3, 12))
    key = jax.random.key(1)
    for selection in ("topk", "sample"):
        rest = {"selection": selection, "balance": 2, "block": 2}
        np.testing.assert_array_equal(
            jitted(scores, 4, key=key, **rest), select(scores, 4, key=key, **rest), strict=True
        )


def draws(scores: list[float], keep: int, times: int, **rest: Any) -> np.ndarray:
    keys = jax.random.split(jax.random.key(7), times)
    one = functools.partial(select, jnp.asarray(scores), keep, selection="sample", **rest)
    return np.asarray(jax.jit(jax.vmap(lambda key: one(key=key)))(keys))


def test_sampling_one_is_in_proportion_to_the_scores() -> None:
    scores = np.asarray([4.0, 0.0, 1.0, 2.0, 1.0])
    drawn = draws(scores.tolist(), 1, 8000)
    counts = np.bincount(drawn[:, 0], minlength=5)
    share = scores / scores.sum()
    assert counts[1] == 0
    # Five standard deviations of a binomial count; the seed is fixed.
    assert (np.abs(counts - 8000 * share) <= 5 * np.sqrt(8000 * share * (1 - share))).all()


def test_sampling_two_is_without_replacement() -> None:
    scores = np.asarray([3.0, 2.0, 1.0])
    pairs = draws(scores.tolist(), 2, 8000)
    assert (pairs[:, 0] < pairs[:, 1]).all()
    # P(the pair) = P(a) P(b) / (1 - P(a)) + P(b) P(a) / (1 - P(b))
    p = scores / 6
    for a, b in ((0, 1), (0, 2), (1, 2)):
        share = p[a] * p[b] * (1 / (1 - p[a]) + 1 / (1 - p[b]))
        count = ((pairs == [a, b]).all(1)).sum()
        assert abs(count - 8000 * share) <= 5 * np.sqrt(8000 * share * (1 - share))


def test_sampled_rows_and_parts_are_drawn_apart() -> None:
    rows = select(jnp.ones((2, 64)), 16, selection="sample", key=jax.random.key(3), balance=2)
    parts = np.asarray(rows).reshape(4, 8) % 32
    assert len({tuple(part) for part in parts.tolist()}) == 4


@pytest.mark.parametrize("selection", ["topk", "sample"])
@pytest.mark.parametrize("score", [0.0, 2.5, NAN])
def test_equal_scores_are_no_ranking(score: float, selection: Selection) -> None:
    scores = jnp.asarray([[score] * 32, [*range(32)]])
    keys = jax.random.split(KEY, 40)
    draw = jax.vmap(lambda key: select(scores, 4, selection=selection, key=key, balance=2))
    flat = np.asarray(draw(keys))[:, 0]
    counts = np.bincount(flat.ravel(), minlength=32)
    assert counts.min() > 0 and counts.max() < 20  # 5 each are expected
    assert (flat[:, :2] < 16).all() and (flat[:, 2:] >= 16).all()
    if selection == "topk":
        assert (np.asarray(draw(keys))[:, 1] == [14, 15, 30, 31]).all()


def test_what_has_no_score_is_sampled_last() -> None:
    scores = [0.0, 1e-30, NAN, 1.0]
    assert (draws(scores, 2, 50) == [1, 3]).all()
    assert (draws(scores, 4, 2) == [0, 1, 2, 3]).all()


@pytest.mark.parametrize(
    ("total", "keep", "rest", "message"),
    [
        (6, 2, {"balance": 4}, "cannot keep 2 of 6 neurons in multiples of 4"),
        (6, 3, {"block": 2}, "cannot keep 3 of 6 neurons in multiples of 2"),
        (8, 4, {"block": 4, "balance": 2}, "cannot keep 4 of 8 neurons in multiples of 8"),
        (6, 7, {}, "cannot keep 7 of 6"),
        (6, -1, {}, "cannot keep -1 of 6"),
    ],
)
def test_what_cannot_be_selected_is_an_error(
    total: int, keep: int, rest: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        select(jnp.arange(float(total)), keep, key=KEY, **rest)
