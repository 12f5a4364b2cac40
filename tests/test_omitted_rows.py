"""Weights with omitted rows: products by hand, with all rows for some tokens."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from sat_jax.nn.linear import combine, dense, project
from sat_jax.nn.omitted_rows import MaskedRows, OmittedRows, dense_tokens
from sat_jax.sparsity.execution.sparse_base import dense_count
from sat_jax.sparsity.rows import gather_complement, gather_rows, indicator
from tests.tolerances import assert_close


@pytest.mark.parametrize("tokens", [False, True])
@pytest.mark.parametrize(
    ("shape", "kept", "parts", "order"),
    [
        ((6,), [1, 2, 4, 5], 2, [1, 2, 0, 4, 5, 3]),
        ((2, 3), [[0, 2], [0, 1]], 1, [0, 2, 1, 3, 4, 5]),
        ((4, 2), [0, 3], 1, [0, 1, 6, 7, 2, 3, 4, 5]),
    ],
)
def test_products_by_hand(
    shape: tuple[int, ...], kept: Any, parts: int, order: list[int], tokens: bool
) -> None:
    """A matrix `[*units, D]` whose omitted rows are 0 but for some tokens; gathered products have
    the kept units of each part in front."""
    rng, mask = np.random.default_rng(0), np.zeros((2, 5), bool)
    mask[0, [1, 4]] = mask[1, 2] = True
    indices = jnp.asarray(kept)
    full = rng.normal(size=(*shape, 3)).astype(np.float32)
    x = rng.normal(size=(2, 5, 3)).astype(np.float32)
    a = rng.normal(size=(2, 5, *shape)).astype(np.float32)
    is_kept = np.asarray(indicator(indices, shape[indices.ndim - 1]))
    is_kept = is_kept.reshape(*is_kept.shape, *(1,) * (len(shape) - is_kept.ndim))
    computed = np.broadcast_to(is_kept, shape)[None, None] | (
        (mask & tokens).reshape(2, 5, *(1,) * len(shape))
    )
    projected = np.einsum("BTD,...D->BT...", x, full) * computed
    combined = np.einsum("BTn,nD->BTD", (a * computed).reshape(2, 5, -1), full.reshape(-1, 3))

    dense_of = dense_tokens(jnp.asarray(mask), 3) if tokens else None
    masked = MaskedRows(
        jnp.asarray(full), indicator(indices, shape[indices.ndim - 1]), dense_of and dense_of.mask
    )
    assert_close(project(masked, x), projected, "float32", "forward")
    assert_close(combine(masked, a), combined, "float32", "forward")
    rows, others = (
        f(jnp.asarray(full)[None], indices[None], parts)[0]
        for f in (gather_rows, gather_complement)
    )
    axis = indices.ndim - 1 - full.ndim
    gathered = OmittedRows(rows, others, dense_of, axis, parts)

    def in_order(y: np.ndarray) -> np.ndarray:
        return y.reshape(2, 5, -1)[..., order].reshape(y.shape)

    assert_close(project(gathered, x), in_order(projected), "float32", "forward")
    assert_close(combine(gathered, in_order(a)), combined, "float32", "forward")
    zeroed = full * is_kept[..., None]
    assert_close(dense(masked), zeroed, "float32", "forward")
    flat = zeroed.reshape(-1, 3)[order].reshape(full.shape)
    assert_close(dense(gathered), flat, "float32", "forward")
    assert gathered.shape == masked.shape == full.shape


def test_the_tokens_of_a_row_are_found() -> None:
    mask = jnp.asarray([[0, 1, 0, 1], [0, 0, 0, 0], [1, 0, 0, 0]], bool)
    assert dense_tokens(mask, 2).places.tolist() == [[1, 3], [0, 1], [0, 1]]
    assert [dense_count(share, 10) for share in (0.7, 0.71, 1.0)] == [7, 8, 10]
