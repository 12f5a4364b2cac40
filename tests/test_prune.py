"""Pruning of one matrix, against golden masks and weights, and by hand."""

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import sat_jax
from sat_jax.compress import InputStatistics, Pruning, prune_matrix
from sat_jax.compress.input_statistics import DAMPING
from sat_jax.errors import UserError
from tests.tolerances import assert_close

GOLDEN = Path(__file__).parent / "golden" / "pruning.npz"


@functools.cache
def golden() -> dict[str, np.ndarray]:
    with np.load(GOLDEN) as arrays:
        return dict(arrays)


def prune(method: str, sparsity: float, pattern: str | None, **options: Any) -> Any:
    return prune_matrix(
        golden()["weight"], golden()["inputs"], method, sparsity, pattern, **options
    )


@pytest.mark.parametrize(
    ("name", "sparsity", "pattern"),
    [
        ("wanda", 0.5, None),
        ("wanda_30", 0.3, None),
        ("wanda_2:4", 0.5, "2:4"),
        ("wanda_4:8", 0.5, "4:8"),
        ("magnitude", 0.5, None),
        ("magnitude_2:4", 0.5, "2:4"),
        ("magnitude_block", 0.5, "block"),
    ],
)
def test_lowest_scores(name: str, sparsity: float, pattern: str | None) -> None:
    pruned, removed = prune(name.partition("_")[0], sparsity, pattern)
    expected = golden()[f"removed_{name}"]
    assert_close(removed, expected, "bool", "exact")
    assert_close(pruned, np.where(expected, 0, golden()["weight"]), "float32", "exact")


@pytest.mark.parametrize(
    ("name", "pattern", "block"),
    [
        ("", None, 128),
        ("_32", None, 32),
        ("_block_32", "block", 32),
        ("_block-threshold_32", "block-threshold", 32),
        ("_2:4", "2:4", 128),
    ],
)
def test_sparsegpt(name: str, pattern: str | None, block: int) -> None:
    pruned, removed = prune("sparsegpt", 0.5, pattern, block=block)
    assert_close(removed, golden()[f"removed_sparsegpt{name}"], "bool", "exact")
    assert_close(pruned, golden()[f"pruned_sparsegpt{name}"], "float32", "product")
    assert not pruned[removed].any()


def test_sparsegpt_with_inputs_that_are_zero() -> None:
    """Their weights, however large, are removed first."""
    inputs, weight = golden()["inputs"].copy(), golden()["weight"].copy()
    inputs[:, golden()["dead_column"]] = 0
    weight[:, golden()["dead_column"]] = 1e6
    pruned, removed = prune_matrix(weight, inputs, "sparsegpt")
    assert_close(removed, golden()["removed_sparsegpt_dead_column"], "bool", "exact")
    assert_close(pruned, golden()["pruned_sparsegpt_dead_column"], "float32", "product")


def test_sparsegpt_by_hand() -> None:
    """Of two columns with correlated inputs, the weight that remains takes over what it can: w₁
    becomes w₁ + w₀ · ⟨x₀, x₁⟩ / (⟨x₁, x₁⟩ + damping)."""
    inputs = np.array([[1.0, 2.0], [0.0, 2.0]])
    pruned, removed = prune_matrix(np.array([[0.1, 1.0]], np.float32), inputs, "sparsegpt")
    assert np.asarray(removed).tolist() == [[True, False]]
    damped = 8 + DAMPING * (1 + 8) / 2
    assert_close(pruned, np.array([[0, 1 + 0.1 * 2 / damped]]), "float32", "product")


def test_columns_that_the_block_does_not_divide() -> None:
    """Blocks of 3, 3 and 1 columns: ⌊3 / 2⌋, ⌊3 / 2⌋ and ⌊1 / 2⌋ weights of each row."""
    rng = np.random.default_rng(0)
    weight, inputs = rng.normal(size=(4, 7)), rng.normal(size=(20, 7))
    _, removed = prune_matrix(weight, inputs, "sparsegpt", block=3)
    counts = [np.asarray(removed)[:, part].sum(1) for part in (slice(3), slice(3, 6), slice(6, 7))]
    assert [count.tolist() for count in counts] == [[1] * 4, [1] * 4, [0] * 4]


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
@pytest.mark.parametrize(("pattern", "sparsity"), [(None, 0.3), ("1:4", 0.75), ("block", 0.3)])
def test_counts(method: str, pattern: str | None, sparsity: float) -> None:
    rng = np.random.default_rng(1)
    weight, inputs = rng.normal(size=(4, 12)), rng.normal(size=(20, 12))
    pruning = Pruning(method, sparsity, pattern, block=8)
    _, removed = pruning.prune(weight, InputStatistics.of_inputs(inputs))
    assert pruning.count(4, 12) == int(removed.sum())


def test_an_unequal_pattern_keeps_the_first_number() -> None:
    weight = np.array([[4, 1, 3, 2, 1, 1, 1, 1]], np.float32)
    pruned, _ = prune_matrix(weight, np.ones((1, 8)), "magnitude", 0.75, "1:4")
    # At a tie the lower index is removed.
    assert np.asarray(pruned).tolist() == [[4, 0, 0, 0, 0, 0, 0, 1]]


def test_the_dtype_is_that_of_the_weight() -> None:
    weight = sat_jax.compress.prune_matrix(
        golden()["weight"].astype(np.float16), golden()["inputs"], "magnitude"
    )[0]
    assert weight.dtype == np.float16


def test_statistics_of_batches_are_added() -> None:
    inputs = golden()["inputs"]
    parts = [InputStatistics.of_inputs(part) for part in (inputs[:300], inputs[300:])]
    total = parts[0] + parts[1]
    assert total.tokens == 1000 and total.gram is not None
    exact = inputs.astype(np.float64)
    assert_close(total.gram, exact.T @ exact, "float64", "forward")
    assert_close(total.squares, (exact**2).sum(0), "float64", "forward")
    without = InputStatistics.of_inputs(inputs, "squares")
    assert without.gram is None
    assert_close(without.squares, total.squares, "float64", "forward")


def test_factor_of_the_inverse() -> None:
    gram = np.array([[4.0, 1.0, 0.0], [1.0, 2.0, 0.0], [0.0, 0.0, 0.0]])
    factor = InputStatistics.of_gram(2, gram).inverse_factor
    damped = gram + np.diag([0, 0, 1]) + np.eye(3) * DAMPING * 7 / 3
    assert_close(factor.T @ factor, np.linalg.inv(damped), "float64", "forward")
    assert not np.tril(factor, -1).any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "wandb"}, "method 'wandb'; accepted: magnitude, wanda, sparsegpt"),
        ({"pattern": "4:2"}, "pattern '4:2'; accepted: no pattern, N:M"),
        ({"pattern": "blocks"}, "pattern 'blocks'; accepted"),
        ({"sparsity": 1.0}, "sparsity 1; accepted: a share between 0 and 1"),
        ({"sparsity": 0.3, "pattern": "2:4"}, "sparsity 0.3 with pattern 2:4, which removes 0.5"),
        ({"pattern": "3:6"}, "pattern 3:6: weight has 128 columns; accepted: multiples of 6"),
        ({"pattern": "3:6", "method": "sparsegpt"}, "pattern 3:6: block has 128 columns; accepted"),
        ({"block": 0}, "block 0; accepted: a number of columns, 1 or more"),
        ({"inputs": np.ones((5, 127))}, r"weight \[64, 128\] and inputs \[5, 127\]; accepted"),
        ({"inputs": np.full((5, 128), np.nan)}, "inputs have values that are not finite"),
    ],
)
def test_misuse_is_a_user_error(options: dict[str, Any], message: str) -> None:
    arguments = {"weight": golden()["weight"], "inputs": golden()["inputs"], "method": "wanda"}
    with pytest.raises(UserError, match=message):
        prune_matrix(**arguments | options)
