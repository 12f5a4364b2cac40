"""What the update of each unit is worth: sums of gradients and of the optimizer's changes."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sat_jax.config import OptimizerConfig
from sat_jax.models.build import layout_of
from sat_jax.nn.loss import next_token_loss
from sat_jax.sparsity.execution.state import new_state, optimizer_step
from sat_jax.train.optimizer import clipping, make_optimizer, parameter_changes
from sat_jax.train.probe import ProbeSettings, make_probe, observe_batch
from tests.conftest import slow_after
from tests.small_models import CONFIGS, batch, random_params
from tests.tolerances import assert_close

CONFIG = CONFIGS["bias"]
LAYOUT = layout_of(CONFIG)
BATCH = batch(CONFIG)
PARAMS = jax.device_put(random_params(CONFIG))


@functools.cache
def mean_gradient() -> dict[str, np.ndarray]:
    def loss(params: Any) -> jax.Array:
        return next_token_loss(LAYOUT.bind(params), *BATCH)[0] / jnp.sum(BATCH.loss_mask)

    return jax.device_get(jax.jit(jax.grad(loss))(PARAMS))


def of_unit(values: dict[str, np.ndarray], unit: str, place: tuple[int, ...]) -> np.ndarray:
    """All entries that belong to one unit, in one row."""
    rows = [v[place] for path, v in values.items() if unit in LAYOUT.leaves[path].axes]
    return np.concatenate([row.reshape(-1) for row in rows]).astype(np.float64)


@pytest.mark.parametrize("name", slow_after(1, "adamw", "lion"))
def test_a_probe_sums_gradients_and_the_changes_of_the_optimizer(name: Any) -> None:
    config = OptimizerConfig(name=name, learning_rate=0.1, weight_decay=0.1, clip_norm=0.5)
    optimizer, clip = make_optimizer(config, 10, LAYOUT), clipping(config)
    gradients = mean_gradient()
    # After two steps with the gradient of other parameters the moments are not those of this one.
    other = jax.tree.map(lambda g: jnp.roll(g, 1, -1), gradients)
    state = new_state(PARAMS, optimizer)
    for _ in range(2):
        state = optimizer_step(optimizer, other, jnp.asarray(1.0), state)
    state = state._replace(params=PARAMS)
    norm = np.sqrt(sum(np.square(g.astype(np.float64)).sum() for g in gradients.values()))
    after = optimizer_step(optimizer, gradients, jnp.asarray(0.5 / norm), state)
    changes = {path: np.asarray(after.params[path]) - PARAMS[path] for path in PARAMS}
    settings = ProbeSettings(
        ("updates",), 0.5, BATCH.tokens.size, functools.partial(parameter_changes, optimizer, clip)
    )
    probe = jax.jit(make_probe(LAYOUT, settings))
    shapes = jax.eval_shape(lambda: observe_batch(LAYOUT, PARAMS, BATCH, ("updates",)))
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), shapes)
    stats = probe(PARAMS, zeros, BATCH, state.optimizer)
    tokens = float(stats.count)
    assert tokens == 19
    for unit, place in (("kv_group", (1, 3)), ("query_head", (2, 1, 2)), ("channel", (0, 23))):
        g, change = (of_unit(values, unit, place) for values in (gradients, changes))
        seen = [np.asarray(values[place]) / tokens for values in stats.updates[unit]]
        expected = [np.abs(g).sum(), np.square(g).sum(), -(g * change).sum()]
        assert min(map(abs, expected)) > 0
        assert_close(seen[:2], expected[:2], "float32", "backward")
        assert_close(seen[2], expected[2], "float32", "retention")
