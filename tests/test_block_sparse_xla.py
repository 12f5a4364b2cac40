"""Products with block masks in plain XLA, which multiply only the stored blocks on a CPU."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.block_sparse_matmul import (
    BlockMask,
    column_matmul,
    reference,
    row_matmul,
    sampled_matmul,
)
from tests.conftest import slow_after
from tests.test_block_sparse_matmul import OPERATIONS, check, normal, operands
from tests.tolerances import assert_close

BLOCK = 16
MASKS = {
    "equal counts": np.eye(4) + np.roll(np.eye(4), 1, 1),
    "unequal counts": np.array(
        [[1, 0, 0, 1, 0, 0], [0, 0, 0, 0, 0, 0], [0, 0, 1, 0, 1, 1], [0, 0, 0, 1, 0, 0]]
    ),
    "empty columns": np.array([[0, 1, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]),
}


@pytest.mark.parametrize(
    ("name", "mask", "dtype"),
    slow_after(
        len(OPERATIONS),
        *((name, "unequal counts", "float32") for name in OPERATIONS),
        # Its gradients are a row and a sampled product.
        *(("column", mask, "float32") for mask in MASKS if mask != "unequal counts"),
        *(("column", mask, "bfloat16") for mask in MASKS),
        ("swiglu_mlp", "unequal counts", "bfloat16"),
    ),
)
def test_values_and_gradients(name: str, mask: str, dtype: str) -> None:
    pattern = BlockMask.of(MASKS[mask], BLOCK)
    check(name, ["xla"], dtype, pattern, operands(pattern, tokens=40, width=0))


def test_lists_by_hand() -> None:
    mask = BlockMask.of(MASKS["unequal counts"], BLOCK)
    rows, columns = mask.row_lists, mask.column_lists
    assert rows.reduction.tolist() == [[0, 3, 0], [0, 0, 0], [2, 4, 5], [3, 0, 0]]
    assert rows.slot.tolist() == [[0, 1, 6], [6, 6, 6], [2, 3, 4], [5, 6, 6]]
    assert columns.reduction.tolist() == [[0, 0], [0, 0], [2, 0], [0, 3], [2, 0], [2, 0]]
    assert columns.slot.tolist() == [[0, 6], [6, 6], [2, 6], [1, 5], [3, 6], [4, 6]]


@pytest.mark.parametrize(
    ("kept", "by_lists"),
    [
        ([[1, 1, 0, 0]] * 2 + [[0, 0, 0, 1]] * 2, {"column", "row", "sampled"}),
        ([[1, 1, 1, 0]] + [[0, 0, 0, 1]] * 3, set()),  # three of four blocks in a row and a column
        ([[1, 0, 0, 0]] * 3 + [[0, 0, 0, 1]], {"column", "sampled"}),  # three in a column
        ([[1, 1, 1, 0]] + [[0, 0, 0, 0]] * 3, {"row"}),  # three in a row
    ],
)
def test_lists_of_more_than_half_of_the_blocks_are_not_used(
    kept: list[list[int]], by_lists: set[str]
) -> None:
    """Products by lists are loops; the others are dense products, as on all other platforms."""
    mask = BlockMask.of(np.array(kept), BLOCK)
    x, w = jnp.zeros((8, 4 * BLOCK)), jnp.zeros((mask.nonzero, BLOCK, BLOCK))
    calls: dict[str, tuple[Any, Any]] = {
        "column": (column_matmul, w),
        "row": (row_matmul, w),
        "sampled": (sampled_matmul, x),
    }

    def has_loop(name: str, platform: str) -> bool:
        function, operand = calls[name]
        call = jax.jit(functools.partial(function, implementation="xla"))
        lowered = call.trace(x, operand, mask).lower(lowering_platforms=(platform,))
        return "stablehlo.while" in lowered.as_text()

    assert {name for name in calls if has_loop(name, "cpu")} == by_lists
    assert not any(has_loop(name, "cuda") for name in calls)


def test_a_layer_axis_in_a_scan() -> None:
    kept = MASKS["equal counts"]
    masks = [BlockMask.of(kept, BLOCK), BlockMask.of(np.roll(kept, 1, 0), BLOCK)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *masks)
    x, w = normal(0, 8, 4 * BLOCK), normal(1, 2, 8, BLOCK, BLOCK) / 8

    def scanned(x: jax.Array, w: jax.Array) -> jax.Array:
        @jax.checkpoint
        def layer(x: jax.Array, layer: Any) -> tuple[jax.Array, None]:
            return x + column_matmul(x, *layer, implementation="xla"), None

        return jnp.sum(jnp.sin(jax.lax.scan(layer, x, (w, stacked))[0]))

    def unrolled(x: jax.Array, w: jax.Array) -> jax.Array:
        for blocks, mask in zip(w, masks, strict=True):
            x = x + reference.column(x, blocks, mask)
        return jnp.sum(jnp.sin(x))

    actual = jax.jit(jax.grad(scanned, (0, 1)))(x, w)
    for gradient, desired in zip(actual, jax.grad(unrolled, (0, 1))(x, w), strict=True):
        assert_close(gradient, desired, "float32", "backward")
