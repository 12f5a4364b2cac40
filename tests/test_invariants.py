"""What holds for every execution of a model: plain, gather, mask, kernel and dynamic."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sat_jax.config import OptimizerConfig
from sat_jax.models.build import layout_of
from sat_jax.models.llama import LlamaConfig
from sat_jax.nn.decoder import Compute, Remat
from sat_jax.nn.param import Mask as UnitMask
from sat_jax.ops import KernelConfig
from sat_jax.sparsity.execution.base import Execution, join_segments
from sat_jax.sparsity.execution.dynamic import Dynamic
from sat_jax.sparsity.execution.gather import Gather
from sat_jax.sparsity.execution.kernel import Kernel
from sat_jax.sparsity.execution.mask import Mask
from sat_jax.sparsity.execution.state import TrainState, new_state
from sat_jax.sparsity.plan import Plan, make_plan
from sat_jax.sparsity.rows import Kept
from sat_jax.train.optimizer import make_optimizer
from tests.conftest import slow_after
from tests.executions import (
    Result,
    assert_gradients_close,
    differentiate,
    equal,
    kept_rows,
    plain,
    run,
)
from tests.small_models import (
    CONFIGS,
    compact_state,
    expand_state,
    neurons,
    nothing_omitted,
    random_kept,
    random_params,
)
from tests.tolerances import assert_close

Kind = type[Execution]


def result(
    kind: Kind,
    config: LlamaConfig,
    plan: Plan,
    kept: Kept,
    compute: Compute = Compute(),
    **rest: Any,
) -> Result:
    return run(kind(layout_of(config, compute), plan, **rest), random_params(config), kept)


@functools.cache
def plain_of(name: str) -> Result:
    return plain(layout_of(CONFIGS[name]), random_params(CONFIGS[name]))


def sparse(name: str, **rest: Any) -> tuple[LlamaConfig, Plan]:
    return CONFIGS[name], make_plan(neurons(CONFIGS[name]), 0.4, 0.5, **rest)


def quick(*values: str) -> Any:
    return pytest.param(*values)


def slow(*values: str) -> Any:
    """Every case compiles two backward passes."""
    return pytest.param(*values, marks=pytest.mark.slow)


# --- 1. Without omitted units every execution is the plain model ---


@pytest.mark.parametrize("name", [quick("gqa"), slow("mha"), slow("bias"), slow("norm")])
def test_gathering_all_units_equals_the_plain_model_bit_for_bit(name: str) -> None:
    config = CONFIGS[name]
    plan = make_plan(neurons(config), 0.0, 0.0, balance=2)
    kept = random_kept(config, plan, always=True)
    assert {unit: indices.shape for unit, indices in kept[0].items()} == {
        "kv_group": (3, 4),
        "channel": (3, 24),
    }
    gathered = result(Gather, config, plan, kept)
    joined = {path: join_segments(value) for path, value in gathered.gradients.items()}
    equal(gathered._replace(gradients=joined), plain_of(name))


@pytest.mark.parametrize(
    ("name", "unit"),
    [
        quick("gqa", "query_head"),
        slow("mha", "kv_group"),
        slow("bias", "kv_group"),
        slow("norm", "query_head"),
    ],
)
def test_masks_of_ones_equal_the_plain_model_bit_for_bit(name: str, unit: Any) -> None:
    config, plan = sparse(name, attention_unit=unit)
    heads = (4,) if unit == "kv_group" else (4, config.query_heads)
    kept = {
        name: jnp.broadcast_to(jnp.arange(shape[-1], dtype=jnp.int32), (3, *shape))
        for name, shape in ((unit, heads), ("channel", (24,)))
    }
    equal(result(Mask, config, plan, (kept,)), plain_of(name))


@pytest.mark.parametrize("kind", [Gather, Mask, Kernel, Execution])
def test_a_plan_that_omits_nothing_is_the_plain_program(kind: Kind) -> None:
    config = CONFIGS["gqa"]
    layout, plan = layout_of(config), make_plan(neurons(config), 0.0, 0.0)
    assert neurons(config).is_dense(plan)
    execution, kept = kind(layout, plan), nothing_omitted(plan)
    params, omitted = execution.compact(random_params(config), kept)

    def bind(trained: Any) -> Any:
        return execution.bind(trained, params, omitted, kept, {})

    programs = [
        str(jax.make_jaxpr(lambda trained, f=function: differentiate(f, trained))(trained))
        for function, trained in (
            (bind, execution.trained(params, kept)),
            (layout.bind, random_params(config)),
        )
    ]
    assert programs[0] == programs[1]


# --- 2. Executions agree, and omitted units have no gradient ---

CASES = {
    "groups, first layer dense": sparse("gqa", dense_layers=(0,), balance=2),
    "mha": sparse("mha"),
    "query heads": sparse("gqa", attention_unit="query_head"),
    "groups with biases": sparse("bias", block=2, balance=4),
    "query heads with biases, middle layer dense": sparse(
        "bias", attention_unit="query_head", dense_layers=(1,)
    ),
    "groups with norms": sparse("norm"),
}


@pytest.mark.parametrize("case", [quick(next(iter(CASES))), *map(slow, list(CASES)[1:])])
def test_mask_and_gather_agree_and_omitted_units_have_no_gradient(case: str) -> None:
    config, plan = CASES[case]
    for seed in range(3):
        kept = random_kept(config, plan, seed)
        by_gather, by_mask = (result(kind, config, plan, kept) for kind in (Gather, Mask))
        assert_close(by_gather.logits, by_mask.logits, "float32", "forward")
        of_kept, of_omitted = Gather(layout_of(config), plan).compact(by_mask.gradients, kept)
        for gradient in jax.tree.leaves(of_kept):
            assert np.any(gradient)
        assert_gradients_close(by_gather.gradients, of_kept)
        assert of_omitted
        for gradient in jax.tree.leaves(of_omitted):
            assert not np.any(gradient)


@pytest.mark.parametrize(
    ("name", "unit", "kernel", "remat"),
    [
        pytest.param(
            *("gqa", "kv_group", KernelConfig(128, "pallas_tpu"), "full"), marks=pytest.mark.slow
        ),
        ("bias", "query_head", KernelConfig(64, "xla"), "none"),
        pytest.param("norm", "kv_group", KernelConfig(64), "dots", marks=pytest.mark.slow),
    ],
)
def test_kernel_and_gather_agree(name: str, unit: Any, kernel: KernelConfig, remat: Remat) -> None:
    """One layer is dense."""
    config = dataclasses.replace(CONFIGS[name], d_ff=512)
    rates = (neurons(config), 0.5, 0.5)
    plan = make_plan(*rates, attention_unit=unit, block=kernel.block, dense_layers=(1,))
    kept = random_kept(config, plan)
    by_kernel = result(Kernel, config, plan, kept, Compute(remat=remat), kernel=kernel)
    by_gather = result(Gather, config, plan, kept)
    assert_close(by_kernel.logits, by_gather.logits, "float32", "forward")
    assert_gradients_close(by_kernel.gradients, by_gather.gradients)


def test_kernel_execution_observes_the_outputs_of_kept_units() -> None:
    config = dataclasses.replace(CONFIGS["mha"], d_ff=256)
    plan = make_plan(*(neurons(config), 0.5, 0.5), block=64)
    kept, layout = random_kept(config, plan), layout_of(config)
    executions = (Gather(layout, plan), Kernel(layout, plan, kernel=KernelConfig(64, "xla")))
    expected, observed = (
        jax.tree.leaves(run(execution, random_params(config), kept, observe=("outputs",)).observed)
        for execution in executions
    )
    assert len(expected) == 2
    for actual, desired in zip(observed, expected, strict=True):
        assert_close(actual, desired, "float32", "forward")


@pytest.mark.slow
def test_different_kept_units_give_different_logits() -> None:
    config, plan = CASES["query heads"]
    first, second = (
        np.asarray(result(Mask, config, plan, random_kept(config, plan, seed)).logits)
        for seed in (0, 1)
    )
    assert np.abs(first - second).max() > 0.1
    assert np.abs(first - plain_of("gqa").logits).max() > 0.1


@pytest.mark.slow
def test_mask_and_gather_agree_in_bfloat16() -> None:
    config, plan = CASES["mha"]
    kept, compute = random_kept(config, plan), Compute(dtype="bfloat16")
    by_gather, by_mask = (result(kind, config, plan, kept, compute) for kind in (Gather, Mask))
    assert_close(by_gather.logits, by_mask.logits, "bfloat16", "forward")
    of_kept = kept_rows(layout_of(config), plan, by_mask.gradients, kept)
    assert {gradient.dtype for gradient in jax.tree.leaves(of_kept)} == {jnp.dtype("float32")}
    assert_gradients_close(by_gather.gradients, of_kept, "bfloat16")


# --- 3. Masks are variables, and one graph definition serves every execution ---


def bound(execution: Execution, params: Any, kept: Kept) -> Any:
    compact, omitted = execution.compact(params, kept)
    return execution.bind(execution.trained(compact, kept), compact, omitted, kept, {})


@pytest.mark.parametrize("unit", ["kv_group", "query_head"])
def test_the_state_shows_a_mask_for_each_head_and_channel(unit: Any) -> None:
    config, plan = sparse("gqa", attention_unit=unit, dense_layers=(0,))
    kept = random_kept(config, plan)
    model = bound(Mask(layout_of(config), plan), jax.device_put(random_params(config)), kept)
    masks = {
        path[-1]: variable.get_value()
        for path, variable in nnx.to_flat_state(nnx.state(model, UnitMask))
    }
    assert masks.keys() == {"kv_group", "query_head", "channel"}
    other = "query_head" if unit == "kv_group" else "kv_group"
    assert masks.pop(other) is None  # all units of that name are kept
    for name, indices in kept[1].items():
        mask = np.asarray(masks[name])
        assert (mask[0] == 1).all()
        assert mask.shape == (3, *indices.shape[1:-1], neurons(config).size(name))
        expected = np.zeros_like(mask[1:])
        np.put_along_axis(expected, np.asarray(indices), 1, axis=-1)
        np.testing.assert_array_equal(mask[1:], expected)


def test_one_graph_definition_serves_every_execution() -> None:
    config, plan = sparse("bias", dense_layers=(1,))
    layout, kept = layout_of(config), random_kept(config, plan)
    params = jax.device_put(random_params(config))
    dense = nnx.graphdef(layout.bind(params))
    executions = (Gather(layout, plan), Mask(layout, plan), Kernel(layout, plan))
    for execution in executions:
        model = bound(execution, params, kept)
        assert jax.tree.leaves(nnx.split(model)[1]), type(execution)
        assert nnx.graphdef(model) == dense, type(execution)
    assert nnx.graphdef(layout_of(CONFIGS["gqa"]).bind(random_params(CONFIGS["gqa"]))) != dense


# --- 4. States are converted exactly ---


def full_state(config: LlamaConfig) -> TrainState:
    """A state whose moments, counts and parameters all differ."""
    state = new_state(
        jax.device_put(random_params(config)),
        make_optimizer(OptimizerConfig(), 9, layout_of(config)),
    )
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: jnp.asarray(rng.integers(0, 99, x.shape).astype(x.dtype)), state)


@pytest.mark.parametrize("kind", slow_after(1, Gather, Mask, Kernel, Dynamic))
@pytest.mark.parametrize("unit", ["kv_group", "query_head"])
def test_expanding_a_compact_state_is_the_identity(kind: Kind, unit: Any) -> None:
    config = CONFIGS["bias"]
    rates = (neurons(config), 0.5, 0.5)
    plan = make_plan(*rates, attention_unit=unit, balance=2, block=2, dense_layers=(1,))
    assert len(plan.segments) == 3
    kept = nothing_omitted(plan) if kind is Dynamic else random_kept(config, plan)
    execution = kind(layout_of(config), plan)
    state = full_state(config)
    compact, omitted = compact_state(execution, state, kept)
    assert any(map(bool, omitted)) == (kind is Gather)
    equal(expand_state(execution, compact, omitted, kept), state)
