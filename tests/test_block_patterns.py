"""Patterns of kept blocks, computed by hand."""

import numpy as np
import pytest

from sat_jax.errors import UserError
from sat_jax.sparsity.block_patterns import (
    BlockCounts,
    Pattern,
    block_counts,
    block_grid,
    blocks_per_row,
    butterfly,
    erk,
    fill,
    initial_blocks,
    random,
)
from sat_jax.sparsity.block_updates import drop_fraction, prune_grow
from tests.tolerances import assert_close
from tests.user_errors import user_error


def drawn(*rows: str) -> np.ndarray:
    """Return True where a row has an x."""
    return np.array([[character == "x" for character in row] for row in rows])


def counts_of(grid: tuple[int, int], per_row: int, longest: int = 99) -> BlockCounts:
    return BlockCounts(grid, 8, per_row, longest)


@pytest.mark.parametrize(
    ("grid", "count", "per_column"),
    [((8, 8), 1, 1), ((8, 4), 1, 2), ((4, 6), 3, 2), ((3, 5), 5, 3)],
)
def test_random_has_equal_rows_and_columns(
    grid: tuple[int, int], count: int, per_column: int
) -> None:
    counts = counts_of(grid, count, per_column)
    patterns = [random(counts, np.random.default_rng(seed)) for seed in (0, 0, 1)]
    for kept in patterns:
        assert kept.shape == grid
        assert set(kept.sum(axis=1)) == {count}
        assert set(kept.sum(axis=0)) == {per_column}
    assert (patterns[0] == patterns[1]).all()
    assert (patterns[0] != patterns[2]).any() == (count < grid[1])


@pytest.mark.parametrize("grid", [(8, 12), (7, 5), (3, 16)])
def test_random_columns_differ_by_at_most_one(grid: tuple[int, int]) -> None:
    counts = block_counts("random", {"up": grid}, 8, 0.35)["up"]
    columns = random(counts, np.random.default_rng(0)).sum(axis=0)
    assert columns.max() - columns.min() <= 1
    assert columns.max() == counts.longest


def test_counts_of_uneven_patterns_limit_block_columns() -> None:
    def counts(density: float, pattern: Pattern = "random", **follows: bool) -> BlockCounts:
        return block_counts(pattern, {"up": (32, 8)}, 16, density, **follows)["up"]

    assert counts(0.25) == BlockCounts((32, 8), 16, 2, 8)
    uneven = BlockCounts((32, 8), 16, 2, 12)
    assert counts(0.25, grown=True) == counts(0.25, exchanged=True) == uneven
    assert counts(0.25, "magnitude") == uneven
    assert counts(0.5, grown=True).longest == 32, "no limit can be guaranteed"
    assert (uneven.nonzero, uneven.density) == (64, 0.25)
    with pytest.raises(UserError, match="pattern 'butterfly' with 1 blocks"):
        counts(0.125, "butterfly", exchanged=True)
    assert counts(0.125, "butterfly", grown=True).per_row == 1


def test_fill_takes_the_highest_scores_within_rows_and_columns() -> None:
    scores = np.array([[1.0, 9, 3, 2], [0, 0, 0, 0], [5, 6, 7, 8]])
    empty = np.zeros(scores.shape, bool)
    expected = drawn(".xx.", "xx..", "..xx")
    np.testing.assert_array_equal(fill(empty, scores, counts_of((3, 4), 2)), expected)
    # At most two blocks in a column: row 1 would take columns 0 and 1, of which 1 is full.
    scores[1] = [5, 4, 1, 0]
    scores[2] = [0, 9, 1, 8]
    expected = drawn(".xx.", "x.x.", ".x.x")
    np.testing.assert_array_equal(fill(empty, scores, counts_of((3, 4), 2, 2)), expected)
    one = counts_of((4, 4), 1, 1)
    scores = np.array([[4.0, 3, 2, 1]] * 4)
    np.testing.assert_array_equal(fill(np.zeros((4, 4), bool), scores, one), np.eye(4, dtype=bool))
    grown = fill(
        drawn("x...", "xx.."), np.array([[9.0, 1, 3, 2], [9, 9, 0, 1]]), counts_of((2, 4), 3)
    )
    np.testing.assert_array_equal(grown, drawn("x.xx", "xx.x"))


@pytest.mark.parametrize("seed", range(3))
def test_every_row_is_filled_within_the_limit(seed: int) -> None:
    counts = block_counts("magnitude", {"up": (12, 9)}, 8, 1 / 3)["up"]
    # All rows prefer the same columns.
    scores = np.arange(9.0) + 0.1 * np.random.default_rng(seed).random((12, 9))
    kept = fill(np.zeros((12, 9), bool), scores, counts)
    assert set(kept.sum(axis=1)) == {3}
    assert kept.sum(axis=0).max() == counts.longest == 6


def test_butterfly_has_strides_of_powers_of_two() -> None:
    expected = drawn(
        "xxx.....",
        "xx.x....",
        "x.xx....",
        ".xxx....",
        "....xxx.",
        "....xx.x",
        "....x.xx",
        ".....xxx",
    )
    np.testing.assert_array_equal(butterfly((8, 8), 3), expected)


def test_butterfly_is_stretched_to_a_grid() -> None:
    assert butterfly((2, 6), 6).all()  # a butterfly of size 2 has no zeros
    # Size 4 with strides 1 and 2.
    expected = drawn("xxxxxx..", "xxxx..xx", "xx..xxxx", "..xxxxxx")
    np.testing.assert_array_equal(butterfly((4, 8), 6), expected)
    np.testing.assert_array_equal(butterfly((8, 4), 3), expected.T)


def test_butterfly_refuses_other_counts() -> None:
    assert user_error(lambda: butterfly((32, 8), 1)) == (
        "pattern 'butterfly' with 1 blocks in a block row of a grid 32 × 8; accepted: 2, 3, 4, 6, 8"
    )
    assert "none: the grid has an odd side" in user_error(lambda: butterfly((3, 8), 2))


def test_erk_gives_smaller_matrices_more() -> None:
    # Half of 16 + 32 blocks is 24, in the ratio of R + C, 8 to 12.
    densities = erk({"a": (4, 4), "b": (8, 4)}, 0.5)
    assert_close([*densities.values()], [24 * 8 / 20 / 16, 24 * 12 / 20 / 32], "float64", "forward")


def test_erk_makes_dense_what_would_be_denser() -> None:
    # Half of 256 + 4 blocks is 130, in the ratio of R + C, 32 to 4: 14.4 of the small one's 4.
    densities = erk({"large": (16, 16), "small": (2, 2)}, 0.5)
    assert_close([*densities.values()], [(0.5 * 260 - 4) / 256, 1.0], "float64", "forward")
    assert erk({"a": (4, 4), "b": (8, 2)}, 1.0) == {"a": 1.0, "b": 1.0}


def test_first_blocks_of_all_patterns() -> None:
    grids, norms = {"up": (16, 8), "query": (8, 8)}, np.random.default_rng(0).random((2, 8, 8))

    def blocks(pattern: Pattern, path: str = "query") -> np.ndarray:
        counts = block_counts(pattern, grids, 8, 0.25)[path]
        values = norms if path == "query" else np.ones((2, 16, 8))
        return initial_blocks(pattern, path, counts, values, seed=0)

    assert blocks("random").shape == (2, 8, 8)
    assert (blocks("random").sum(axis=-1) == 2).all()
    assert (blocks("random") == blocks("random")).all()
    assert (blocks("random")[0] != blocks("random")[1]).any(), "layers draw for themselves"
    assert (blocks("random") != blocks("erk")).sum() == 0, "the same density here"
    # A quarter of 128 + 64 blocks is 48, in the ratio 24 to 16: 28.8 and 19.2, rounded by row.
    assert (blocks("erk", "up")[0].sum(), blocks("erk")[0].sum()) == (16 * 2, 8 * 2)
    assert (blocks("butterfly")[0] == butterfly((8, 8), 2)).all()
    counts = block_counts("magnitude", grids, 8, 0.25)["query"]
    expected = fill(np.zeros((8, 8), bool), norms[1], counts)
    np.testing.assert_array_equal(blocks("magnitude")[1], expected)


def test_blocks_per_row() -> None:
    assert [blocks_per_row("up", d, 8) for d in (0.125, 0.19, 0.2, 1.0)] == [1, 2, 2, 8]
    assert user_error(lambda: blocks_per_row("layers/mlp/up", 0.05, 8)) == (
        "density 0.05 keeps 0 of the 8 blocks in a block row of layers/mlp/up;"
        " accepted: 0.0625 to 1"
    )
    assert "keeps 9 of the 8" in user_error(lambda: blocks_per_row("up", 1.1, 8))


def test_a_block_divides_a_matrix() -> None:
    assert block_grid("up", 96, 48, 16) == (6, 3)
    assert user_error(lambda: block_grid("layers/mlp/up", 96, 48, 32)) == (
        "sparsity.weights.block 32 does not divide layers/mlp/up [96, 48], or is no multiple of 8;"
        " accepted: 8, 16, 24, 48"
    )
    for sizes in ((48, 32, 48), (32, 48, 48), (48, 48, 12), (48, 48, 0)):
        assert "accepted: 8, 16" in user_error(lambda sizes=sizes: block_grid("up", *sizes))
    assert "accepted: none" in user_error(lambda: block_grid("up", 12, 16, 4))


def test_prune_grow_drops_the_smallest_of_a_layer_and_grows_by_gradient() -> None:
    kept = drawn("xxxx....", "....xxxx")
    norms = np.array([[9.0, 1, 7, 3, 0, 0, 0, 0], [0, 0, 0, 0, 4, 2, 6, 8]])
    gradients = np.array([[9.0, 0, 9, 1, 5, 6, 2, 0], [1, 2, 3, 4, 9, 9, 9, 9]])
    counts = counts_of((2, 8), 4)

    def changed(fraction: float) -> np.ndarray:
        return prune_grow(kept, norms, gradients, fraction, counts)

    # 0.4 · 8 = 3.2: the blocks of norms 1, 2 and 3. In the second row the dropped one returns.
    np.testing.assert_array_equal(changed(0.4), drawn("x.x.xx..", "....xxxx"))
    np.testing.assert_array_equal(changed(0.125), drawn("x.xx.x..", "....xxxx"))
    np.testing.assert_array_equal(changed(0.12), kept)


def test_drop_fraction_is_a_cosine() -> None:
    fractions = [drop_fraction(step, 8, 0.4) for step in (0, 2, 4, 8, 9)]
    expected = [0.4, 0.2 * (1 + 0.5**0.5), 0.2, 0.0, 0.0]
    assert_close(fractions, expected, "float64", "forward")
