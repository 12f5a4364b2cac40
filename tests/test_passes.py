"""Passes that omit units: the backward pass alone, and the gradients of weights alone."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sat_jax.models.build import layout_of
from sat_jax.nn.decoder import Compute
from sat_jax.ops import KernelConfig
from sat_jax.sparsity.execution.base import Execution
from sat_jax.sparsity.execution.gather import Gather
from sat_jax.sparsity.execution.kernel import Kernel
from sat_jax.sparsity.execution.mask import Mask
from sat_jax.sparsity.plan import AttentionUnit, Plan, make_plan
from sat_jax.sparsity.rows import Kept
from tests.executions import assert_gradients_close, kept_rows, plain, run
from tests.small_models import CONFIGS, neurons, random_kept, random_params
from tests.tolerances import assert_close

CONFIG = CONFIGS["bias"]
LAYOUT = layout_of(CONFIG)
UNITS = ["kv_group", pytest.param("query_head", marks=pytest.mark.slow)]
KERNEL = KernelConfig(8, "xla")


def plan_of(unit: AttentionUnit, **rest: Any) -> Plan:
    return make_plan(neurons(CONFIG), 0.5, 0.5, attention_unit=unit, block=8, **rest)


def executions(plan: Plan) -> list[Execution]:
    return [
        Gather(LAYOUT, plan, passes="backward"),
        Mask(LAYOUT, plan, passes="backward"),
        Kernel(LAYOUT, plan, passes="backward", kernel=KERNEL),
    ]


@pytest.mark.parametrize("unit", UNITS)
def test_the_logits_are_dense_and_executions_agree(unit: AttentionUnit) -> None:
    """Of three layers the first is dense."""
    plan = plan_of(unit, dense_layers=(0,))
    kept, params = random_kept(CONFIG, plan), random_params(CONFIG)
    dense = plain(LAYOUT, params)
    by_gather, by_mask, by_kernel = (run(e, params, kept) for e in executions(plan))
    recomputed = layout_of(CONFIG, Compute(remat="full"))
    by_remat = run(Gather(recomputed, plan, passes="backward"), params, kept)
    for result in (by_gather, by_mask, by_kernel, by_remat):
        assert_close(result.logits, dense.logits, "float32", "forward")
    of_omitted = Gather(LAYOUT, plan).compact(by_mask.gradients, kept)[1]
    assert of_omitted and not any(np.any(gradient) for gradient in jax.tree.leaves(of_omitted))
    by_mask = by_mask._replace(gradients=kept_rows(LAYOUT, plan, by_mask.gradients, kept))
    for result in (by_mask, by_kernel, by_remat):
        assert_gradients_close(result.gradients, by_gather.gradients)
    # No layer after the last MLP omits anything: its kept channels have the dense gradient. The
    # gradients of earlier layers come through kept units alone.
    reference = kept_rows(LAYOUT, plan, dense.gradients, kept)
    for path in ("layers/mlp/gate", "layers/mlp/up", "layers/mlp/down"):
        actual, expected = by_gather.gradients[path][1], reference[path][1]
        assert_close(actual[-1], expected[-1], "float32", "backward")
        assert float(jnp.abs(actual[0] - expected[0]).max()) > 1e-3


# On the newest jax, test_step.py trains with these passes.
@pytest.mark.slow
@pytest.mark.parametrize("unit", ["kv_group", "query_head"])
def test_without_weight_gradients_of_omitted_units_the_others_are_those_of_the_dense_model(
    unit: AttentionUnit,
) -> None:
    """Of three layers the first is dense; the others keep as many units in each of two parts."""
    plan = make_plan(
        *(neurons(CONFIG), 0.5, 0.5), attention_unit=unit, dense_layers=(0,), balance=2
    )
    kept, params = random_kept(CONFIG, plan), random_params(CONFIG)
    dense = plain(LAYOUT, params)
    expected = kept_rows(LAYOUT, plan, dense.gradients, kept)
    recomputed = layout_of(CONFIG, Compute(remat="full"))
    for layout in (LAYOUT, recomputed):
        by_gather = run(Gather(layout, plan, passes="weights"), params, kept)
        assert_close(by_gather.logits, dense.logits, "float32", "forward")
        assert_gradients_close(by_gather.gradients, expected)
    by_mask = run(Mask(LAYOUT, plan, passes="weights"), params, kept)
    assert_close(by_mask.logits, dense.logits, "float32", "exact")
    of_kept, of_omitted = Gather(LAYOUT, plan).compact(by_mask.gradients, kept)
    assert_gradients_close(of_kept, expected)
    assert of_omitted and not any(np.any(gradient) for gradient in jax.tree.leaves(of_omitted))


def test_a_branch_that_keeps_all_units_has_no_complement() -> None:
    plan = make_plan(neurons(CONFIG), 0.0, 0.5, block=8)
    kept, params = random_kept(CONFIG, plan), jax.device_put(random_params(CONFIG))
    for execution in executions(plan):
        for units, expected in ((kept, {"mlp"}), (({},), set())):
            assert _complements(execution, params, units) == expected


def _complements(execution: Execution, params: Any, kept: Kept) -> set[str]:
    compact, omitted = execution.compact(params, kept)
    model: Any = execution.bind(execution.trained(compact, kept), compact, omitted, kept, {})
    parts = {"attention": model.layers.attention, "mlp": model.layers.mlp}
    return {name for name, branch in parts.items() if branch.complement is not None}
