"""Dynamic selection: layers keep what `choose` would keep, and compute as if it had been given."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sat_jax.config_values import from_config_dict
from sat_jax.models.build import layout_of
from sat_jax.nn.decoder import Compute, Remat
from sat_jax.sparsity.choose import Criteria, choose
from sat_jax.sparsity.execution.dynamic import Dynamic
from sat_jax.sparsity.execution.mask import Mask
from sat_jax.sparsity.importance import METRICS
from sat_jax.sparsity.plan import Plan, make_plan
from sat_jax.sparsity.rows import Kept
from sat_jax.sparsity.statistics import statistics_of
from tests.executions import Result, assert_gradients_close, differentiate, run
from tests.small_models import CONFIGS, neurons, nothing_omitted, random_params
from tests.tolerances import assert_close

KEY = jax.random.key(7)


def plan_of(name: str, **rest: Any) -> Plan:
    return make_plan(neurons(CONFIGS[name]), 0.5, 0.5, **rest)


GROUPS = plan_of("bias", dense_layers=(0,), balance=2, block=2)
QUERY_HEADS = plan_of("gqa", attention_unit="query_head")
SLOW = pytest.mark.slow  # every case compiles two backward passes


def dynamic(
    name: str, plan: Plan, masked: bool = False, remat: Remat = "none", **criteria: Any
) -> Dynamic:
    layout = layout_of(CONFIGS[name], Compute(remat=remat))
    return Dynamic(layout, plan, criteria=Criteria(**criteria), masked=masked)


def result(execution: Dynamic, name: str, key: Any = KEY) -> Result:
    return run(execution, random_params(CONFIGS[name]), nothing_omitted(execution.plan), key=key)


def kept_of(result: Result) -> Kept:
    return tuple(segment.get("kept", {}) for segment in result.observed)


@pytest.mark.parametrize(
    ("name", "plan", "remat", "masked"),
    [
        ("bias", GROUPS, "none", False),
        pytest.param("bias", GROUPS, "none", True, marks=SLOW),
        pytest.param("gqa", QUERY_HEADS, "full", False, marks=SLOW),
        pytest.param("gqa", QUERY_HEADS, "full", True, marks=SLOW),
    ],
)
def test_it_equals_mask_execution_of_the_same_units(
    name: str, plan: Plan, remat: Remat, masked: bool
) -> None:
    """Logits and gradients are equal, those of omitted units (0) too: the choice has none."""
    execution = dynamic(name, plan, masked, remat, metric="wanda")
    actual = result(execution, name)
    mask = Mask(layout_of(CONFIGS[name]), plan)
    expected = run(mask, random_params(CONFIGS[name]), kept_of(actual))
    assert_close(actual.logits, expected.logits, "float32", "forward")
    joined = execution.expand(actual.gradients, {}, ())
    assert_gradients_close(joined, expected.gradients)


@SLOW
@pytest.mark.parametrize(
    ("name", "plan", "metric"),
    [
        ("bias", GROUPS, "svd"),
        ("gqa", QUERY_HEADS, "maxip"),
        ("bias", GROUPS, "magnitude"),
        ("bias", GROUPS, "wanda"),
    ],
)
def test_each_layer_keeps_what_choose_keeps_for_its_own_input(
    name: str, plan: Plan, metric: str
) -> None:
    """A masked model with the same units has the same inputs in each layer: from these, `choose`
    chooses the same units."""
    config, layout = CONFIGS[name], layout_of(CONFIGS[name])
    kept, params = kept_of(result(dynamic(name, plan, metric=metric), name)), random_params(config)
    observed = run(Mask(layout, plan), params, kept, observe=METRICS[metric].needs).observed
    stats = statistics_of(jnp.asarray(19.0), observed)
    chosen = choose(layout, jax.device_put(params), stats, plan, Criteria(metric), KEY).kept
    assert jax.tree.structure(kept) == jax.tree.structure(chosen)
    for actual, expected in zip(jax.tree.leaves(kept), jax.tree.leaves(chosen), strict=True):
        np.testing.assert_array_equal(actual, expected, strict=True)


@pytest.mark.parametrize(
    "criteria", [{"metric": "uniform"}, {"metric": "magnitude", "selection": "sample"}]
)
def test_random_choices_depend_on_the_key_and_the_layer(criteria: dict[str, str]) -> None:
    plan = make_plan(neurons(CONFIGS["gqa"]), 0.0, 0.5)
    execution = dynamic("gqa", plan, **criteria)

    def kept(seed: int) -> np.ndarray:
        (segment,) = kept_of(result(execution, "gqa", jax.random.key(seed)))
        return np.asarray(segment["channel"])

    one, same, other = kept(7), kept(7), kept(8)
    np.testing.assert_array_equal(one, same)
    assert not np.array_equal(one, other)
    assert not np.array_equal(one[0], one[1])
    with pytest.raises(ValueError, match="a dynamic selection needs a key"):
        result(execution, "gqa", None)


@pytest.mark.parametrize("remat", ["dots", "full"])
def test_the_backward_pass_does_not_select_again(remat: Remat) -> None:
    """It could select other units, where recomputed values are rounded otherwise."""
    execution = dynamic("gqa", QUERY_HEADS, remat=remat, metric="wanda")
    options = {"selection": execution.selection, "key": KEY}
    program = jax.make_jaxpr(lambda params: differentiate(execution.layout.bind, params, **options))
    # Of heads and of channels, in the body of a scan.
    assert str(program(random_params(CONFIGS["gqa"]))).count("top_k[") == 2


@pytest.mark.parametrize("masked", [False, True])
def test_a_plan_that_omits_nothing_selects_nothing(masked: bool) -> None:
    config = CONFIGS["gqa"]
    plan = make_plan(neurons(config), 0.0, 0.0)
    execution = dynamic("gqa", plan, masked)
    assert execution.computes_omitted == masked
    assert kept_of(result(execution, "gqa", None)) == ({},)


DYNAMIC = {"rate": 0.5, "refresh_every": 0, "metric": "maxip"}


def test_settings_that_a_dense_run_does_not_use_are_accepted() -> None:
    assert from_config_dict(
        {"sparsity": {"refresh_every": 0}, "train": {"accumulate": 2, "rows_per_step": 2}}
    )
    assert from_config_dict(
        {"sparsity": DYNAMIC | {"execution": "mask"}, "optimizer": {"moments": "decay"}}
    )
