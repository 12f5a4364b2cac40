"""Layers that choose for themselves: they keep what `choose` would, and compute as if told so."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sat_jax.models.live import Live
from sat_jax.nn.decoder import Compute, Remat
from sat_jax.models.params import abstract, bind
from sat_jax.ops import KernelConfig
from sat_jax.sparsity.importance import METRICS
from sat_jax.sparsity.masks import Criteria, choose
from sat_jax.sparsity.neurons import compact, mask_values
from sat_jax.sparsity.plan import Plan, make_plan
from sat_jax.sparsity.statistics import Observable, Statistics
from tests.small_models import CONFIGS, Rows, batch, neurons, nothing_omitted, random_params
from tests.test_config import built, refusal
from tests.tolerances import assert_close

KEY = jax.random.key(7)


def rows() -> Rows:
    return batch(CONFIGS["gqa"])  # the same for all: their vocabulary has one size


@functools.partial(jax.jit, static_argnums=0)
def differentiated(graph: Any, params: dict[str, Any], masks: dict[str, Any], key: Any) -> Any:
    """((loss, what was seen), gradients)."""

    def loss(params: dict[str, Any]) -> tuple[jax.Array, Statistics]:
        return bind(graph, params | masks).loss(*rows(), key=key)

    return jax.value_and_grad(loss, has_aux=True)(params)


@functools.partial(jax.jit, static_argnames=("graph", "observe"))
def seen(
    graph: Any,
    params: dict[str, Any],
    masks: dict[str, Any],
    key: Any = None,
    observe: tuple[Observable, ...] = (),
) -> Statistics:
    model, inputs = bind(graph, params | masks), (rows().tokens, rows().segment_ids)
    return model.hidden(*inputs, rows().positions, observe, key=key)[1]


def cut(name: str, plan: Plan) -> dict[str, Any]:
    return compact(random_params(CONFIGS[name]), nothing_omitted(plan), plan)[0]


def live(
    name: str, plan: Plan, masked: bool = False, remat: Remat = "none", **criteria: Any
) -> Any:
    """The graph of a model whose layers choose by `criteria`."""
    how = Live(Criteria(**criteria), plan.balance, plan.block)
    graph, shapes = abstract(CONFIGS[name], plan.segments, Compute(remat=remat), masked, how)
    assert {path: leaf.shape for path, leaf in shapes.items()} == {
        path: leaf.shape for path, leaf in cut(name, plan).items()
    }
    return graph


def told(name: str, plan: Plan) -> Any:
    """The graph of the reference: mask execution of given masks."""
    return abstract(CONFIGS[name], plan.segments, masked=True)[0]


def plan_of(name: str, **rest: Any) -> Plan:
    return make_plan(neurons(CONFIGS[name]), 0.5, 0.5, **rest)


GROUPS = plan_of("bias", dense_layers=(0,), balance=2, block=2)
QUERY_HEADS = plan_of("gqa", attention_unit="query_head")


SLOW = pytest.mark.slow  # every case compiles two backward passes


@pytest.mark.parametrize(
    ("name", "plan", "remat", "masked"),
    [
        ("bias", GROUPS, "none", False),
        pytest.param("bias", GROUPS, "none", True, marks=SLOW),
        pytest.param("gqa", QUERY_HEADS, "full", False, marks=SLOW),
        pytest.param("gqa", QUERY_HEADS, "full", True, marks=SLOW),
    ],
)
def test_it_is_the_model_that_is_told_what_to_keep(
    name: str, plan: Plan, remat: Remat, masked: bool
) -> None:
    """In loss and gradients, those of omitted neurons (zero) too: the choice takes none."""
    params = cut(name, plan)
    graph = live(name, plan, masked, remat, metric="wanda")
    (loss, stats), gradients = differentiated(graph, params, {}, KEY)
    (expected, _), reference = differentiated(
        told(name, plan), params, mask_values(stats.kept), None
    )
    assert_close(loss, expected, "float32", "forward")
    for path, gradient in reference.items():
        assert_close(gradients[path], gradient, "float32", "backward")


@SLOW
def test_kernels_compute_what_a_layer_chooses() -> None:
    config = dataclasses.replace(CONFIGS["gqa"], d_ff=256)
    plan = make_plan(neurons(config), 0.5, 0.5, block=64)
    params, _ = compact(random_params(config), nothing_omitted(plan), plan)
    how = Live(Criteria("wanda"), plan.balance, plan.block)
    results = []
    for kernels in (None, KernelConfig(64, "xla")):
        graph, _ = abstract(config, plan.segments, Compute(kernels=kernels), live=how)
        (loss, _), gradients = differentiated(graph, params, {}, KEY)
        results.append((loss, gradients))
    (loss, gradients), (expected, reference) = results
    assert_close(loss, expected, "float32", "forward")
    for path, gradient in reference.items():
        assert_close(gradients[path], gradient, "float32", "backward")


@pytest.mark.parametrize(
    ("name", "plan", "metric"),
    [
        ("bias", GROUPS, "svd"),
        ("gqa", QUERY_HEADS, "maxip"),
        pytest.param("bias", GROUPS, "magnitude", marks=SLOW),
        pytest.param("bias", GROUPS, "wanda", marks=SLOW),
    ],
)
def test_every_layer_keeps_what_its_own_input_says(name: str, plan: Plan, metric: str) -> None:
    """A model told what they chose sees the inputs that they saw: from these `choose` chooses the
    same."""
    kept = seen(live(name, plan, metric=metric), cut(name, plan), {}, KEY).kept
    needs = METRICS[metric].needs
    stats = seen(told(name, plan), cut(name, plan), mask_values(kept), observe=needs)
    params = {path: jnp.asarray(value) for path, value in random_params(CONFIGS[name]).items()}
    chosen = choose(params, stats, plan, neurons(CONFIGS[name]), Criteria(metric), KEY)
    assert jax.tree.structure(kept) == jax.tree.structure(chosen)
    for one, other in zip(jax.tree.leaves(kept), jax.tree.leaves(chosen), strict=True):
        np.testing.assert_array_equal(one, other, strict=True)


@pytest.mark.parametrize(
    "criteria", [{"metric": "uniform"}, {"metric": "magnitude", "selection": "sample"}]
)
def test_every_layer_draws_by_the_key(criteria: dict[str, str]) -> None:
    plan = make_plan(neurons(CONFIGS["gqa"]), 0.0, 0.5)
    graph, params = live("gqa", plan, **criteria), cut("gqa", plan)
    one, same, other = (
        np.asarray(seen(graph, params, {}, jax.random.key(seed)).kept[0].channels)
        for seed in (7, 7, 8)
    )
    np.testing.assert_array_equal(one, same)
    assert not np.array_equal(one, other)
    assert not np.array_equal(one[0], one[1])
    with pytest.raises(ValueError, match="a live model needs a key"):
        seen(graph, params, {})


@pytest.mark.parametrize("remat", ["dots", "full"])
def test_the_backward_pass_does_not_choose_again(remat: Remat) -> None:
    """It could choose otherwise, where what it recomputes is rounded otherwise."""
    graph = live("gqa", QUERY_HEADS, remat=remat, metric="wanda")

    def loss(params: dict[str, Any]) -> jax.Array:
        return bind(graph, params).loss(*rows(), key=KEY)[0]

    program = str(jax.make_jaxpr(jax.grad(loss))(cut("gqa", QUERY_HEADS)))
    assert program.count("top_k[") == 2  # of heads and of channels, in the body of a scan


def test_what_keeps_everything_is_not_live() -> None:
    config = CONFIGS["gqa"]
    dense = make_plan(neurons(config), 0.0, 0.0)
    assert abstract(config, dense.segments, live=Live(Criteria())) == abstract(config)


LIVE = {"sparsity__rate": 0.5, "sparsity__refresh_every": 0, "sparsity__metric": "maxip"}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"sparsity__metric": "taylor"},
            "sparsity.refresh_every 0 selects before neurons give the outputs that sparsity.metric"
            " 'taylor' needs; accepted: the metrics uniform, magnitude, wanda, maxip, svd, or"
            " refresh_every 1 or more",
        ),
        (
            {"train__accumulate": 2, "train__rows_per_step": 2},
            "sparsity.refresh_every 0 selects from each batch, and the microbatches of"
            " train.accumulate 2 share one selection; accepted: train.accumulate 1, or"
            " refresh_every 1 or more",
        ),
        (
            {"sparsity__probe_tokens": 64},
            "sparsity.probe_tokens 64 has no place where sparsity.refresh_every is 0 and each layer"
            " sees the whole batch; accepted: 1024",
        ),
        (
            {"sparsity__stats_decay": 0.5},
            "sparsity.stats_decay 0.5 has no place where sparsity.refresh_every is 0 and each layer"
            " sees the whole batch; accepted: 0.9",
        ),
    ],
)
def test_what_a_layer_cannot_know_is_refused(values: dict[str, Any], message: str) -> None:
    assert refusal(lambda: built(**(LIVE | values))) == message


def test_what_a_dense_run_does_not_ask_is_not_refused() -> None:
    assert built(sparsity__refresh_every=0, train__accumulate=2, train__rows_per_step=2)
    assert built(**LIVE, sparsity__execution="mask", optimizer__moments="decay")
