"""Patterns of kept blocks, computed by hand."""

import numpy as np
import pytest

from sat_jax.sparsity.block_patterns import (
    block_grid,
    blocks_per_row,
    butterfly,
    erk,
    magnitude,
    random,
    static_blocks,
)
from sat_jax.sparsity.block_updates import drop_fraction, grow_only, prune_grow
from tests.tolerances import assert_close
from tests.user_errors import user_error


def drawn(*rows: str) -> np.ndarray:
    """Return True where a row has an x."""
    return np.array([[character == "x" for character in row] for row in rows])


@pytest.mark.parametrize(
    ("grid", "count", "per_column"),
    [((8, 8), 1, 1), ((8, 4), 1, 2), ((4, 6), 3, 2), ((3, 5), 5, 3)],
)
def test_random_has_equal_rows_and_columns(
    grid: tuple[int, int], count: int, per_column: int
) -> None:
    patterns = [random(grid, count, np.random.default_rng(seed)) for seed in (0, 0, 1)]
    for kept in patterns:
        assert kept.shape == grid
        assert set(kept.sum(axis=1)) == {count}
        assert set(kept.sum(axis=0)) == {per_column}
    assert (patterns[0] == patterns[1]).all()
    assert (patterns[0] != patterns[2]).any() == (count < grid[1])


def test_random_refuses_unequal_columns() -> None:
    assert user_error(lambda: random((8, 12), 4, np.random.default_rng(0))) == (
        "pattern 'random' with 4 of 12 blocks in each of 8 block rows has unequal block columns;"
        " accepted: multiples of 3"
    )


def test_magnitude_keeps_the_largest_of_each_row() -> None:
    values = np.array([[1.0, 9, 3, 2], [0, 0, 0, 0], [5, 6, 7, 8]])
    expected = drawn(".xx.", "xx..", "..xx")
    np.testing.assert_array_equal(magnitude(values, 2), expected)
    np.testing.assert_array_equal(magnitude(np.stack([values, values]), 2)[1], expected)


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


def test_static_blocks_of_all_matrices() -> None:
    rng = np.random.default_rng(0)
    values = {"up": rng.random((2, 16, 8)), "query": rng.random((2, 8, 8))}
    kept = {
        name: static_blocks(name, values, 0.25, seed=0)
        for name in ("random", "magnitude", "butterfly", "erk")
    }
    for name in ("random", "magnitude", "butterfly"):
        for path, layers in kept[name].items():
            assert layers.shape == values[path].shape
            assert (layers.sum(axis=-1) == 2).all()
    # A quarter of 128 + 64 blocks is 48, in the ratio 24 to 16: 28.8 and 19.2, rounded by row.
    assert {path: layers[0].sum() for path, layers in kept["erk"].items()} == {
        "up": 16 * 2,
        "query": 8 * 2,
    }
    first, second = kept["random"]["query"]
    assert (first != second).any(), "layers draw for themselves"
    assert (kept["butterfly"]["query"][0] == kept["butterfly"]["query"][1]).all()
    np.testing.assert_array_equal(kept["magnitude"]["up"][1], magnitude(values["up"][1], 2))
    assert user_error(lambda: static_blocks("circles", values, 0.25, 0)) == (
        "pattern 'circles'; accepted: random, magnitude, erk, butterfly"
    )


def test_blocks_per_row() -> None:
    assert [blocks_per_row("up", d, 8) for d in (0.125, 0.19, 0.2, 1.0)] == [1, 2, 2, 8]
    assert blocks_per_row("up", 0.25, 8, multiple=4) == 4
    assert user_error(lambda: blocks_per_row("layers/mlp/up", 0.05, 8)) == (
        "density 0.05 keeps 0 of the 8 blocks in a block row of layers/mlp/up;"
        " accepted: 0.0625 to 1"
    )
    assert "keeps 9 of the 8" in user_error(lambda: blocks_per_row("up", 1.1, 8))


def test_a_block_divides_a_matrix() -> None:
    assert block_grid("up", 96, 48, 16) == (6, 3)
    assert user_error(lambda: block_grid("layers/mlp/up", 96, 48, 32)) == (
        "block 32 of layers/mlp/up [96, 48]; accepted: 8, 16, 24, 48"
    )
    for sizes in ((48, 32, 48), (32, 48, 48), (48, 48, 12), (48, 48, 0)):
        assert "accepted: 8, 16" in user_error(lambda sizes=sizes: block_grid("up", *sizes))
    assert "accepted: none" in user_error(lambda: block_grid("up", 12, 16, 4))


def test_prune_grow_drops_the_smallest_and_grows_by_gradient() -> None:
    kept = drawn("xxxx....", "....xxxx")
    norms = np.array([[4.0, 1, 3, 2, 0, 0, 0, 0], [0, 0, 0, 0, 1, 2, 3, 4]])
    gradients = np.array([[9.0, 0, 9, 1, 5, 6, 2, 0], [1, 2, 3, 4, 9, 9, 9, 9]])
    # 0.6 · 4 = 2.4: two of each row. In the second row the dropped have the largest gradients.
    expected = drawn("x.x.xx..", "....xxxx")
    np.testing.assert_array_equal(prune_grow(kept, norms, gradients, 0.6), expected)
    np.testing.assert_array_equal(prune_grow(kept, norms, gradients, 0.2), kept)
    both = prune_grow(*(np.stack([x, x]) for x in (kept, norms, gradients)), 0.6)
    np.testing.assert_array_equal(both, np.stack([expected, expected]))


def test_grow_only_adds_the_largest_gradients() -> None:
    kept = drawn("x...", "xx..")
    gradients = np.array([[9.0, 1, 3, 2], [9, 9, 0, 1]])
    np.testing.assert_array_equal(grow_only(kept, gradients, 3), drawn("x.xx", "xx.x"))
    message = "grow_only to 1 blocks in a block row; accepted: 2 to 4"
    assert user_error(lambda: grow_only(kept, gradients, 1)) == message
    assert "grow_only to 5" in user_error(lambda: grow_only(kept, gradients, 5))


def test_drop_fraction_is_a_cosine() -> None:
    fractions = [drop_fraction(step, 8, 0.4) for step in (0, 2, 4, 8, 9)]
    expected = [0.4, 0.2 * (1 + 0.5**0.5), 0.2, 0.0, 0.0]
    assert_close(fractions, expected, "float64", "forward")
