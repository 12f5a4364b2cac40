"""Probes: which tokens they see, and what they observe."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sat_jax.models.build import layout_of
from sat_jax.sparsity.statistics import Statistics
from sat_jax.train.probe import ProbeSettings, make_probe, observe_batch, probe_shape
from tests.conftest import slow_after
from tests.small_models import CONFIGS, Rows, batch, random_params
from tests.tolerances import assert_close

CONFIG = CONFIGS["gqa"]


@pytest.mark.parametrize(
    ("tokens", "part"),
    [(1, (1, 1)), (7, (1, 7)), (8, (1, 8)), (15, (1, 8)), (16, (2, 8)), (32, (4, 8)), (99, (4, 8))],
)
def test_a_probe_sees_at_most_so_many_tokens(tokens: int, part: tuple[int, int]) -> None:
    assert probe_shape(4, 8, tokens) == part


def expected(part: Rows) -> Statistics:
    """Half of the ones before, and what a dense pass over the part sees."""
    seen = observe_batch(layout_of(CONFIG), random_params(CONFIG), part, ("outputs",))
    return jax.tree.map(lambda new: 0.5 + new, seen)


def test_a_probe_is_a_dense_pass_over_the_first_tokens() -> None:
    rows = batch(CONFIG)
    length = rows.tokens.shape[1]
    dense = expected(jax.tree.map(lambda x: x[:1], rows))
    settings = ProbeSettings(("outputs",), decay=0.5, tokens=length + 1)
    probe = jax.jit(make_probe(layout_of(CONFIG), settings))
    stats = probe(random_params(CONFIG), jax.tree.map(jnp.ones_like, dense), rows)
    for a, b in zip(jax.tree.leaves(stats), jax.tree.leaves(dense), strict=True):
        assert_close(a, b, "float32", "forward")


@pytest.mark.parametrize(
    ("tokens", "row", "columns"), slow_after(1, (4, 1, slice(5, 9)), (10, 1, slice(0, 10)))
)
def test_a_probe_of_gradients_is_where_the_loss_is(tokens: int, row: int, columns: slice) -> None:
    rows, layout, params = batch(CONFIG), layout_of(CONFIG), random_params(CONFIG)
    mask = jnp.zeros_like(rows.loss_mask).at[0, 2].set(True).at[1, 5:9].set(True)
    rows = rows._replace(loss_mask=mask)
    part = jax.tree.map(lambda x: x[row : row + 1, columns], rows)
    expected = observe_batch(layout, params, part, ("gradients",))
    probe = make_probe(layout, ProbeSettings(("gradients",), decay=0.0, tokens=tokens))
    stats = jax.jit(probe)(params, jax.tree.map(jnp.ones_like, expected), rows)
    for a, b in zip(jax.tree.leaves(stats), jax.tree.leaves(expected), strict=True):
        assert np.abs(a).max() > 0
        assert_close(a, b, "float32", "backward")
