"""Optimizers and learning rates, by hand and against optax."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sat_jax.config import OptimizerConfig
from sat_jax.models.build import layout_of
from sat_jax.train.optimizer import (
    NeuronAdamState,
    clipping,
    learning_rate,
    make_optimizer,
    scale_by_neuron_adam,
)
from tests.small_models import CONFIGS
from tests.tolerances import assert_close

LAYOUT = layout_of(CONFIGS["bias"])
# One of each kind: units within groups, units, a layer alone, no layer. Sizes are arbitrary.
SHAPES = {
    "layers/attention/query_bias": (2, 2, 3, 4),
    "layers/attention/key": (2, 2, 4, 5),
    "layers/mlp_norm": (2, 5),
    "embed": (7, 5),
}
COUNTS = {
    "layers/attention/query_bias": (2, 2, 3),
    "layers/attention/key": (2, 2),
    "layers/mlp_norm": (2,),
    "embed": (),
}
MATRICES = {p for p in SHAPES if not p.endswith(("norm", "bias"))}

Tree = dict[str, Any]


def random_tree(seed: int) -> Tree:
    rng = np.random.default_rng(seed)
    return {p: jnp.asarray(rng.normal(size=s).astype(np.float32)) for p, s in SHAPES.items()}


def adamw(**changes: Any) -> OptimizerConfig:
    """Plain Adam at a constant learning rate of 0.1, with `changes`."""
    plain = {"learning_rate": 0.1, "schedule": "constant", "clip_norm": None}
    return OptimizerConfig(**{**plain, **changes})


def updates(config: OptimizerConfig, grads: list[Tree], params: Tree, steps: int = 9) -> list[Tree]:
    """The update of each of `grads` in turn; `params` are the same for all."""
    optimizer = make_optimizer(config, steps, LAYOUT)
    state, results = optimizer.init(params), []
    update = jax.jit(optimizer.update) if len(grads) > 2 else optimizer.update
    for grad in grads:
        added, state = update(grad, state, params)
        results.append(added)
    return results


def test_counts_are_per_unit_and_moments_per_entry() -> None:
    params = random_tree(0)
    state = scale_by_neuron_adam(0.9, 0.95, LAYOUT).init(params)
    assert {path: count.shape for path, count in state.counts.items()} == COUNTS
    for moments in (state.mu, state.nu):
        assert {path: (m.shape, m.dtype) for path, m in moments.items()} == {
            path: (shape, np.float32) for path, shape in SHAPES.items()
        }
    assert all(not leaf.any() for leaf in jax.tree.leaves(state))


def test_adam_by_hand() -> None:
    """Three channels of width 2 that were updated 0, 1 and 4 times before."""
    path, beta1, beta2 = "layers/mlp/up", 0.9, 0.95
    counts, m, v = [0, 1, 4], [[0.0, 0.0], [0.1, -0.3], [0.4, 0.05]], [[0, 0], [0.2, 0.1], [0.3, 1]]
    grad = [[2.0, -1.0], [0.5, 0.0], [-3.0, 1e-3]]
    state = NeuronAdamState(
        {path: jnp.asarray([counts])},
        {path: jnp.asarray([m], jnp.float32)},
        {path: jnp.asarray([v], jnp.float32)},
    )
    scaled, after = scale_by_neuron_adam(beta1, beta2, LAYOUT).update(
        {path: jnp.asarray([grad], jnp.float32)}, state
    )
    assert after.counts[path].tolist() == [[1, 2, 5]]
    for channel in range(3):
        n = counts[channel] + 1
        for i in range(2):
            g = grad[channel][i]
            mean = beta1 * m[channel][i] + (1 - beta1) * g
            square = beta2 * v[channel][i] + (1 - beta2) * g**2
            expected = (mean / (1 - beta1**n)) / (math.sqrt(square / (1 - beta2**n)) + 1e-8)
            assert_close(after.mu[path][0, channel, i], mean, "float32", "backward")
            assert_close(after.nu[path][0, channel, i], square, "float32", "backward")
            assert_close(scaled[path][0, channel, i], expected, "float32", "backward")


def test_equal_counts_give_the_updates_of_optax_adamw() -> None:
    params, grads = random_tree(0), [random_tree(seed) for seed in range(1, 5)]
    theirs = optax.adamw(
        0.1, 0.8, 0.95, weight_decay=0.01, mask={path: path in MATRICES for path in SHAPES}
    )
    state, update = theirs.init(params), jax.jit(theirs.update)
    config = adamw(beta1=0.8, beta2=0.95, weight_decay=0.01)
    for grad, ours in zip(grads, updates(config, grads, params), strict=True):
        expected, state = update(grad, state, params)
        for path in SHAPES:
            assert_close(ours[path], expected[path], "float32", "backward")


def test_the_first_update_of_a_neuron_moves_it_by_one_learning_rate() -> None:
    """With a global step count it would be (1 - β1) / √(1 - β2) learning rates."""
    path = "layers/mlp/gate"
    optimizer = make_optimizer(adamw(), 100_000, LAYOUT)
    state = optimizer.init({path: jnp.zeros((1, 2, 3))})
    # Channel 0 was updated at each of 10,000 steps, channel 1 never.
    counts = {(1, 2): jnp.asarray([[10_000, 0]])}
    state = jax.tree.map(lambda leaf: counts.get(leaf.shape, leaf), state)
    added, _ = optimizer.update(
        {path: jnp.full((1, 2, 3), -0.7)}, state, {path: jnp.zeros((1, 2, 3))}
    )
    rates = np.asarray(added[path])[0, 1] / 0.1
    assert np.round(rates, 2).tolist() == [1.0] * 3


@pytest.mark.parametrize("name", ["adamw", "lion"])
def test_weight_decay_is_for_matrices_only(name: Any) -> None:
    params, grads = random_tree(0), [random_tree(1)]
    (without,) = updates(adamw(name=name), grads, params)
    (with_decay,) = updates(adamw(name=name, weight_decay=0.5), grads, params)
    for path in SHAPES:
        decayed = -0.1 * 0.5 * np.asarray(params[path]) if path in MATRICES else 0.0
        assert_close(with_decay[path], without[path] + decayed, "float32", "backward")


def test_clipping_scales_by_the_global_norm() -> None:
    for limit, factor in [(0.5, 0.25), (2.0, 1.0), (8.0, 1.0), (None, 1.0)]:
        assert float(clipping(adamw(clip_norm=limit))(jnp.float32(2.0))) == factor
    assert float(clipping(adamw(clip_norm=1.0))(jnp.float32(0.0))) == 1
    assert math.isnan(float(clipping(adamw(clip_norm=1.0))(jnp.float32(np.nan))))


def test_lion_by_hand() -> None:
    params, grads = random_tree(0), [random_tree(1), random_tree(2)]
    first, second = updates(adamw(name="lion", beta1=0.9, beta2=0.99), grads, params)
    for path in SHAPES:
        one, two = (np.asarray(g[path], np.float64) for g in grads)
        assert_close(first[path], -0.1 * np.sign(one), "float32", "backward")
        direction = np.sign(0.9 * 0.01 * one + 0.1 * two)
        assert_close(second[path], -0.1 * direction, "float32", "backward")


@pytest.mark.parametrize("rule", [{}, {"name": "lion", "beta2": 0.99}])
def test_only_the_first_moment_is_in_bfloat16(rule: Any) -> None:
    """Updates are those of float32 moments, up to rounding."""
    params, grads = random_tree(0), [random_tree(seed) for seed in (1, 2)]
    half = adamw(momentum_dtype="bfloat16", **rule)
    state = make_optimizer(half, 9, LAYOUT).init(params)
    _, state = make_optimizer(half, 9, LAYOUT).update(grads[0], state, params)
    sizes = [leaf.dtype for leaf in jax.tree.leaves(state) if leaf.dtype != jnp.int32]
    assert sizes.count(jnp.bfloat16) == len(SHAPES)
    assert sizes.count(jnp.float32) == len(SHAPES) * ("name" not in rule)
    expected = updates(adamw(**rule), grads, params)
    for actual, desired in zip(updates(half, grads, params), expected, strict=True):
        for path in SHAPES:
            assert actual[path].dtype == jnp.float32
            assert_close(actual[path], desired[path], "bfloat16", "backward")


def cosine(share: float) -> float:
    return 0.2 + 0.8 * (1 + math.cos(math.pi * share)) / 2


# Peak 1, last 0.2: the factors of 8 steps.
RATES = {
    ("cosine", 0): [cosine(i / 7) for i in range(8)],
    ("cosine", 1): [cosine(i / 7) for i in range(8)],
    ("cosine", 3): [1 / 3, 2 / 3, *[cosine(i / 5) for i in range(6)]],
    ("cosine", 7): [*[(i + 1) / 7 for i in range(7)], 0.2],
    ("linear", 0): [1 - 0.8 * i / 7 for i in range(8)],
    ("linear", 4): [0.25, 0.5, 0.75, *[1 - 0.8 * i / 4 for i in range(5)]],
    ("constant", 0): [1.0] * 8,
    ("constant", 2): [0.5, *[1.0] * 7],
    ("linear", 8): [(i + 1) / 8 for i in range(8)],  # warm-up only
    ("wsd", 0): [1.0, 1.0, 1.0, 1.0, 0.8, 0.6, 0.4, 0.2],
    ("wsd", 2): [0.5, 1.0, 1.0, 1.0, 0.8, 0.6, 0.4, 0.2],
    ("wsd", 6): [*[(i + 1) / 6 for i in range(6)], 0.6, 0.2],  # fewer steps than decay_share remain
}


@pytest.mark.parametrize(("schedule", "warmup"), RATES)
def test_learning_rates_by_hand(schedule: Any, warmup: int) -> None:
    config = OptimizerConfig(
        learning_rate=1.0, schedule=schedule, warmup_steps=warmup, final_scale=0.2, decay_share=0.5
    )
    rate = learning_rate(config, 8)
    rates = [float(rate(jnp.int32(step))) for step in range(8)]
    assert_close(rates, RATES[schedule, warmup], "float32", "backward")


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant", "wsd"])
def test_a_run_of_one_step_has_the_peak_rate(schedule: Any) -> None:
    for warmup in (0, 1):
        rate = learning_rate(adamw(schedule=schedule, warmup_steps=warmup), 1)
        assert_close(rate(jnp.int32(0)), 0.1, "float32", "backward")


def test_each_step_moves_by_its_learning_rate() -> None:
    """Adam under a constant gradient moves every entry by exactly the learning rate."""
    params = random_tree(0)
    config = adamw(schedule="linear", warmup_steps=2, final_scale=0.0)
    results = updates(config, [jax.tree.map(jnp.ones_like, params)] * 6, params, steps=6)
    for added, factor in zip(results, [0.5, 1.0, 0.75, 0.5, 0.25, 0.0], strict=True):
        for path in SHAPES:
            assert_close(added[path], np.full(SHAPES[path], -0.1 * factor), "float32", "backward")


def test_matrices_of_layers_have_a_learning_rate_of_their_own() -> None:
    params = random_tree(0)
    (added,) = updates(adamw(matrix_scale=0.25), [jax.tree.map(jnp.ones_like, params)], params)
    for path in SHAPES:
        rate = 0.025 if path == "layers/attention/key" else 0.1
        assert_close(added[path], np.full(SHAPES[path], -rate), "float32", "backward")
