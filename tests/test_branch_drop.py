"""Backward passes of whole branches that steps leave out."""

import dataclasses
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sat_jax.config import OptimizerConfig
from sat_jax.models.build import layout_of
from sat_jax.nn.branch import set_backward
from sat_jax.nn.context import Context
from sat_jax.nn.decoder import Compute
from sat_jax.nn.norms import rms_norm
from sat_jax.nn.rope import rotary_tables
from sat_jax.nn.stack import Remat
from sat_jax.sparsity.branch_drop import draw_backward, systematic_sample
from sat_jax.sparsity.execution.base import Execution
from sat_jax.sparsity.execution.gather import Gather
from sat_jax.sparsity.execution.mask import Mask
from sat_jax.sparsity.execution.state import PARAMS, TrainState, new_state
from sat_jax.sparsity.flops import traced_flops, training_flops
from sat_jax.sparsity.plan import Passes, Plan, make_plan
from sat_jax.sparsity.rows import Kept
from sat_jax.sparsity.statistics import Statistics
from sat_jax.train.optimizer import clipping, learning_rate, make_optimizer
from sat_jax.train.step import StepSettings, make_step
from tests.executions import assert_gradients_close
from tests.small_models import (
    CONFIGS,
    batch,
    compact_state,
    expand_state,
    neurons,
    random_kept,
    random_params,
)
from tests.test_flops import COMPUTED, GQA, PLANS, REMATS, TOKENS, Traced, segment
from tests.tolerances import assert_close

CONFIG = CONFIGS["gqa"]
LAYOUT = layout_of(CONFIG)
ROWS = batch(CONFIG)
HAS_BACKWARD = {"attention": (True, False, True), "mlp": (False, True, True)}
RATES = tuple((name, tuple(1.0 - c for c in layers)) for name, layers in HAS_BACKWARD.items())


def test_a_sample_has_each_entry_at_its_rate_and_a_fixed_size() -> None:
    rates = jnp.asarray([0.0, 1.0, 0.3, 0.7, 0.1, 0.4])
    keys = jax.random.split(jax.random.key(0), 4000)
    samples = np.asarray(jax.jit(jax.vmap(lambda key: systematic_sample(key, rates)))(keys))
    assert set(samples.sum(1)) == {2, 3}  # the rates have the sum 2.5
    assert (samples[:, 0].any(), samples[:, 1].all()) == (False, True)
    # Four standard errors of a frequency.
    assert np.abs(samples.mean(0) - rates).max() < 4 * 0.5 / 4000**0.5
    whole = np.asarray(jax.vmap(lambda key: systematic_sample(key, rates[2:4]))(keys))
    assert set(whole.sum(1)) == {1}


def test_every_step_draws_anew() -> None:
    plan = dataclasses.replace(
        make_plan(neurons(CONFIG), 0.0, 0.0), dropped=(("mlp", (0.5,) * 40), ("attention", (0.5,)))
    )
    draws = [
        draw_backward(plan, seed, jnp.asarray(step)) for seed, step in ((0, 0), (0, 1), (1, 0))
    ]
    assert {draw["mlp"].shape for draw in draws} == {(40,)}
    assert {int(draw["mlp"].sum()) for draw in draws} == {20}
    first, second, third = (np.asarray(draw["mlp"]) for draw in draws)
    assert (first != second).any() and (first != third).any()


def reference(params: Any) -> jax.Array:
    """The residual stream after the layers; branches without backward pass are constants."""
    graph, stacked = nnx.split(LAYOUT.bind(params).layers)
    rotary = rotary_tables(CONFIG.rope, CONFIG.rotary_dim, ROWS.positions)
    x = params["embed"][ROWS.tokens]
    for layer in range(CONFIG.n_layers):
        block: Any = nnx.merge(graph, jax.tree.map(lambda leaf, n=layer: leaf[n], stacked))
        for name in ("attention", "mlp"):
            norm = getattr(block, f"{name}_norm")
            y = getattr(block, name)(
                rms_norm(x, norm, CONFIG.norm_eps), Context(ROWS.segment_ids, rotary)
            )
            x = x + (y if HAS_BACKWARD[name][layer] else jax.lax.stop_gradient(y))
    return rms_norm(x, params["final_norm"], CONFIG.norm_eps)


def gradients(hidden: Any, params: Any) -> tuple[jax.Array, Any]:
    def scalar(params: Any) -> tuple[jax.Array, jax.Array]:
        x = hidden(params)
        return jnp.sum(x * jax.random.normal(jax.random.key(11), x.shape)), x

    grad, x = jax.jit(jax.grad(scalar, has_aux=True))(params)
    return x, grad


@pytest.mark.parametrize("remat", ["none", pytest.param("full", marks=pytest.mark.slow)])
def test_gradients_are_those_of_branches_that_are_constants(remat: Any) -> None:
    params = jax.device_put(random_params(CONFIG))
    layout = layout_of(CONFIG, Compute(remat=remat))

    def hidden(params: Any) -> jax.Array:
        model = layout.bind(params)
        set_backward(model.layers, {name: jnp.asarray(c) for name, c in HAS_BACKWARD.items()})
        return model.hidden(ROWS.tokens, ROWS.segment_ids, ROWS.positions)[0]

    (x, actual), (expected_x, expected) = (gradients(f, params) for f in (hidden, reference))
    assert_close(x, expected_x, "float32", "forward")
    assert_gradients_close(actual, expected)
    for name, layers in HAS_BACKWARD.items():
        for layer, computed in enumerate(layers):
            for path, value in actual.items():
                if path.startswith(f"layers/{name}/"):
                    assert bool(np.any(value[layer])) == computed, (path, layer)


OPTIMIZER = OptimizerConfig(learning_rate=1e-3, weight_decay=0.1)


def train(execution: Execution, kept: Kept, begin: TrainState) -> TrainState:
    settings = StepSettings(
        make_optimizer(OPTIMIZER, 4, LAYOUT), clipping(OPTIMIZER), learning_rate(OPTIMIZER, 4)
    )
    step = jax.jit(make_step(execution, settings))
    state, omitted = compact_state(execution, begin, kept)
    for _ in range(2):
        state, _, _ = step(state, Statistics(jnp.zeros(())), kept, ROWS, omitted[PARAMS])
    return expand_state(execution, state, omitted, kept)


def plan_of(rate: float) -> Plan:
    plan = make_plan(neurons(CONFIG), rate, rate, dense_layers=(2,))
    return dataclasses.replace(plan, dropped=RATES)


@pytest.mark.slow
@pytest.mark.parametrize("rate", [0.0, 0.5])
def test_dropped_branches_do_not_change_bit_for_bit(rate: float) -> None:
    """Also together with omitted units, in two segments; gather and mask train alike."""
    plan = plan_of(rate)
    kept = random_kept(CONFIG, plan)
    begin = new_state(jax.device_put(random_params(CONFIG)), make_optimizer(OPTIMIZER, 4, LAYOUT))
    gather, mask = (
        train(execution, kept, begin)
        for execution in (Gather(LAYOUT, plan, "weights"), Mask(LAYOUT, plan, "weights"))
    )
    for one, other in zip(jax.tree.leaves(gather), jax.tree.leaves(mask), strict=True):
        assert_close(one, other, "float32", "backward")
    before, after = (
        {"params": s.params, "mu": s.optimizer[0].mu, "counts": s.optimizer[0].counts}
        for s in (begin, gather)
    )
    for name, layers in HAS_BACKWARD.items():
        for tree, values in before.items():
            for path, value in values.items():
                if path.startswith(f"layers/{name}/"):
                    changed = np.asarray(value != after[tree][path])
                    for layer, computed in enumerate(layers):
                        assert changed[layer].any() == computed, (tree, path, layer)


class WithConditions(Traced):
    """A plan's programs in which every branch of every layer may lack its backward pass."""

    def bind(self, trained: Any, values: Any) -> Any:
        model = super().bind(trained, values)
        layers = self.execution.split_layers(jnp.ones(GQA.n_layers, bool))
        set_backward(model.layers, dict.fromkeys(HAS_BACKWARD, layers))
        return model


FAST = (("all", "dots"), ("weights", "full"))
CASES = [
    pytest.param(passes, remat, marks=() if (passes, remat) in FAST else pytest.mark.slow)
    for passes in get_args(Passes)
    for remat in REMATS
]


@pytest.mark.parametrize(("passes", "remat"), CASES)
def test_flops_of_dropped_branches(passes: Passes, remat: Remat) -> None:
    """Conditionals are traced with both results: computed everywhere, and nowhere."""
    plan = (segment(0, 1, 4, 3, 24), segment(1, 3, 2, 3, 8))
    model = WithConditions(GQA, plan, lambda layout, plan: Gather(layout, plan, passes), remat)
    everywhere = tuple((name, (1.0,) * GQA.n_layers) for name in HAS_BACKWARD)
    for conditional, dropped in ((max, ()), (min, everywhere)):
        traced = traced_flops(*model.step, conditional=conditional)
        count = training_flops(LAYOUT, COMPUTED, plan, remat, passes=passes, dropped=dropped)
        assert_close(traced, TOKENS * count.total, "float64", "forward")


def test_the_rate_of_each_layer_counts() -> None:
    """Per token and layer the backward pass of an MLP has 2 · 2 · 3 · 24 · 16 operations."""
    plan = PLANS["dense"]
    dense, dropped = (
        training_flops(LAYOUT, COMPUTED, plan, dropped=rates).total
        for rates in ((), (("mlp", (0.25, 0.0, 1.0)),))
    )
    assert dense - dropped == 1.25 * 2 * 2 * 3 * 24 * 16
