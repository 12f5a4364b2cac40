"""A forward pass of all neurons and a backward pass of the kept ones, in three executions."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sat_jax.nn.decoder import Compute
from sat_jax.models.params import abstract, bind, numbered
from sat_jax.ops import KernelConfig
from sat_jax.sparsity.neurons import (
    compact,
    in_place_values,
    mask_values,
    omitted_values,
    take_kept,
)
from sat_jax.sparsity.plan import AttentionUnit, Plan, make_plan
from tests.small_models import neurons, random_masks, random_params
from tests.test_step import CONFIG, close, cut_only, rows, start, train
from tests.tolerances import assert_close

UNITS = ["kv_group", pytest.param("query_head", marks=pytest.mark.slow)]
KERNELS = KernelConfig(8, "xla")
LAST = CONFIG.n_layers - 1


def plan_of(unit: AttentionUnit, **rest: Any) -> Plan:
    rates = (neurons(CONFIG), 0.5, 0.5)
    return make_plan(*rates, attention_unit=unit, block=8, forward_all=True, **rest)


def loss_and_gradients(
    plan: Plan, masks: Any, execution: str, **compute: Any
) -> tuple[jax.Array, Any]:
    """Of the parameters that are trained, as the step computes them."""
    whole = {path: jnp.asarray(value) for path, value in random_params(CONFIG).items()}
    small, resting = compact(whole, masks if execution == "gather" else cut_only(plan), plan)
    params, told = small, omitted_values(small, resting)
    kernels = KERNELS if execution == "kernel" else None
    if execution == "mask":
        told = mask_values(masks)
    if execution == "kernel":
        params, told = take_kept(small, masks), in_place_values(small, masks)
    settings = Compute(kernels=kernels, **compute)
    graph, _ = abstract(CONFIG, plan.segments, settings, execution == "mask")

    def loss(params: Any) -> jax.Array:
        return bind(graph, params | told).loss(*rows(0))[0]

    found: tuple[jax.Array, Any] = jax.jit(jax.value_and_grad(loss))(params)
    return found


def dense() -> tuple[jax.Array, Any]:
    graph, _ = abstract(CONFIG)
    values = {path: jnp.asarray(value) for path, value in numbered(random_params(CONFIG)).items()}
    found: tuple[jax.Array, Any] = jax.jit(
        jax.value_and_grad(lambda params: bind(graph, params).loss(*rows(0))[0])
    )(values)
    return found


@pytest.mark.parametrize("unit", UNITS)
def test_the_loss_is_the_dense_one_and_executions_agree(unit: AttentionUnit) -> None:
    plan = plan_of(unit)
    masks = random_masks(CONFIG, plan)
    expected, of_all = dense()
    loss, by_gather = loss_and_gradients(plan, masks, "gather")
    assert_close(loss, expected, "float32", "forward")
    by_mask = take_kept(loss_and_gradients(plan, masks, "mask")[1], masks)
    by_kernel = loss_and_gradients(plan, masks, "kernel")[1]
    saved_less = loss_and_gradients(plan, masks, "gather", remat="full")[1]
    for path, gradient in by_gather.items():
        for other in (by_mask, by_kernel, saved_less):
            assert_close(other[path], gradient, "float32", "backward")
    # Behind the last MLP there is nothing that omits: its kept channels have the dense gradient.
    # What comes before is reached on the way back through kept neurons alone.
    reference = take_kept(of_all, masks)
    for name in ("gate", "up", "down"):
        path = f"layers/0/mlp/{name}"
        assert_close(by_gather[path][LAST], reference[path][LAST], "float32", "backward")
        assert float(jnp.abs(by_gather[path][0] - reference[path][0]).max()) > 1e-3


@pytest.mark.parametrize("unit", UNITS[:1])
def test_steps_of_three_executions_agree_and_leave_the_omitted_alone(unit: AttentionUnit) -> None:
    plan, begin = plan_of(unit), start()
    masks = random_masks(CONFIG, plan)
    after = train(begin, plan, masks, range(2))
    for other in (
        train(begin, plan, masks, range(2), masked=True),
        train(begin, plan, masks, range(2), kernels=KERNELS),
    ):
        close(other, after)
    resting = [compact(state.params, masks, plan)[1] for state in (begin, after)]
    assert resting[0]
    for path, value in resting[0].items():
        np.testing.assert_array_equal(resting[1][path], value)


def test_what_keeps_everything_is_an_ordinary_segment() -> None:
    plan = plan_of("kv_group", dense_layers=(0,))
    assert [segment.forward_all for segment in plan.segments] == [False, True]
    assert make_plan(neurons(CONFIG), 0.0, 0.0, forward_all=True) == make_plan(
        neurons(CONFIG), 0.0, 0.0
    )
