"""What must always hold of the executions of one model: plain, gathered, masked, by kernels."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sat_jax.nn.decoder import Compute, Remat
from sat_jax.models.llama import LlamaConfig
from sat_jax.models.params import abstract, bind, numbered
from sat_jax.ops import KernelConfig
from sat_jax.sparsity.masks import Masks, SegmentMasks
from sat_jax.sparsity.neurons import (
    compact,
    expand,
    in_place_values,
    keep_only,
    mask_values,
    take_kept,
)
from sat_jax.sparsity.plan import Plan, make_plan
from tests.small_models import (
    CONFIGS,
    batch,
    neurons,
    nothing_omitted,
    random_masks,
    random_params,
)
from tests.tolerances import assert_close


class Result(NamedTuple):
    """Logits, and gradients under a random cotangent by path of whole or compacted parameters."""

    logits: np.ndarray
    gradients: dict[str, np.ndarray]


@functools.partial(jax.jit, static_argnums=0)
def logits_and_gradients(graph: Any, params: dict[str, Any], masks: dict[str, Any]) -> Any:
    rows = batch(CONFIGS["mha"])  # the same for all: their vocabulary has one size

    def scalar(params: dict[str, Any]) -> tuple[jax.Array, jax.Array]:
        model = bind(graph, params | masks)
        logits = model(rows.tokens, rows.segment_ids, rows.positions)
        cotangent = jax.random.normal(jax.random.key(11), logits.shape)
        return jnp.sum(logits * cotangent), logits

    (_, logits), gradients = jax.value_and_grad(scalar, has_aux=True)(params)
    return logits, gradients


def run(graph: Any, params: dict[str, Any], masks: dict[str, Any]) -> Result:
    return Result(*jax.tree.map(np.asarray, logits_and_gradients(graph, params, masks)))


@functools.cache
def plain(name: str) -> Result:
    config = CONFIGS[name]
    return run(abstract(config)[0], numbered(random_params(config)), {})


def gathered(config: LlamaConfig, plan: Plan, masks: Masks, compute: Compute = Compute()) -> Result:
    """Gradients by path of the compacted parameters."""
    small, _ = compact(random_params(config), masks, plan)
    return run(abstract(config, plan.segments, compute)[0], small, {})


def masked(config: LlamaConfig, plan: Plan, masks: Masks, compute: Compute = Compute()) -> Result:
    """Gradients by path of the whole parameters, cut into the plan's segments."""
    graph, _ = abstract(config, plan.segments, compute, masked=True)
    return run(graph, cut(config, plan), mask_values(masks))


def in_place(config: LlamaConfig, plan: Plan, masks: Masks, compute: Compute) -> Result:
    """By kernels. Gradients by path of the kept rows, whose values are not used."""
    return run(abstract(config, plan.segments, compute)[0], *kept_and_whole(config, plan, masks))


def kept_and_whole(
    config: LlamaConfig, plan: Plan, masks: Masks
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Parameters of kernel execution, kept rows without their values, and what lies in place."""
    whole = cut(config, plan)
    kept = take_kept(whole, masks)
    unused = {
        path: jnp.full_like(rows, jnp.nan)
        for path, rows in kept.items()
        if rows.shape != whole[path].shape
    }
    assert {"query", "output", "gate", "up", "down"} <= {path.split("/")[-1] for path in unused}
    return kept | unused, in_place_values(whole, masks)


def cut(config: LlamaConfig, plan: Plan) -> dict[str, Any]:
    return compact(random_params(config), nothing_omitted(plan), plan)[0]


def equal(one: Result, other: Result) -> None:
    assert_close(one.logits, other.logits, "float32", "exact")
    assert one.gradients.keys() == other.gradients.keys()
    for path, gradient in other.gradients.items():
        assert_close(one.gradients[path], gradient, "float32", "exact")


def sparse(name: str, **rest: Any) -> tuple[LlamaConfig, Plan]:
    return CONFIGS[name], make_plan(neurons(CONFIGS[name]), 0.4, 0.5, **rest)


def quick(*values: str) -> Any:
    return pytest.param(*values)


def slow(*values: str) -> Any:
    """Every case compiles two backward passes."""
    return pytest.param(*values, marks=pytest.mark.slow)


# --- 1. nothing is lost where nothing is omitted ---


@pytest.mark.parametrize("name", [quick("gqa"), slow("mha"), slow("bias"), slow("norm")])
def test_gathering_everything_is_the_plain_model_to_the_last_bit(name: str) -> None:
    config = CONFIGS[name]
    plan = make_plan(neurons(config), 0.0, 0.0, balance=2)
    everything = random_masks(config, plan, always=True)
    assert everything[0].heads.shape == (3, 4)
    assert everything[0].channels.shape == (3, 24)
    equal(gathered(config, plan, everything), plain(name))


@pytest.mark.parametrize(
    ("name", "unit"),
    [
        quick("gqa", "query_head"),
        slow("mha", "kv_group"),
        slow("bias", "kv_group"),
        slow("norm", "query_head"),
    ],
)
def test_a_mask_of_ones_is_the_plain_model_to_the_last_bit(name: str, unit: Any) -> None:
    config, plan = sparse(name, attention_unit=unit)
    # The masked modules of a sparse plan, with every neuron among the kept.
    heads = (4,) if unit == "kv_group" else (4, config.query_heads)
    everything = tuple(
        SegmentMasks(
            *(
                jnp.broadcast_to(jnp.arange(shape[-1], dtype=jnp.int32), (3, *shape))
                for shape in (heads, (24,))
            )
        )
        for _ in plan.segments
    )
    equal(masked(config, plan, everything), plain(name))


def test_the_last_rung_is_the_dense_program() -> None:
    for config in CONFIGS.values():
        plan = make_plan(neurons(config), 0.0, 0.0)
        assert neurons(config).is_dense(plan)
        dense = abstract(config)
        for masks in (False, True):
            graph, shapes = abstract(config, plan.segments, masked=masks)
            assert graph == dense[0]
            assert shapes == dense[1]


# --- 2. mask and gather agree; 3. omitted neurons have no gradient ---

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
def test_mask_and_gather_agree_and_the_omitted_get_no_gradient(case: str) -> None:
    config, plan = CASES[case]
    for seed in range(3):
        masks = random_masks(config, plan, seed)
        by_gather, by_mask = gathered(config, plan, masks), masked(config, plan, masks)
        assert_close(by_gather.logits, by_mask.logits, "float32", "forward")
        whole = expand(by_mask.gradients, {}, nothing_omitted(plan), plan)
        kept, _ = compact(whole, masks, plan)
        assert kept.keys() == by_gather.gradients.keys()
        for path, gradient in kept.items():
            assert np.any(gradient), path
            assert_close(by_gather.gradients[path], gradient, "float32", "backward")

        zeros = {path: jnp.zeros_like(g) for path, g in by_mask.gradients.items()}
        for path, gradient in keep_only(zeros, by_mask.gradients, masks).items():
            assert not np.any(gradient), path


@pytest.mark.parametrize(
    ("name", "unit", "kernels", "remat"),
    [
        ("gqa", "kv_group", KernelConfig(128, "pallas_tpu"), "full"),
        ("bias", "query_head", KernelConfig(64, "xla"), "none"),
        pytest.param("norm", "kv_group", KernelConfig(64), "dots", marks=pytest.mark.slow),
    ],
)
def test_kernels_and_gather_agree(
    name: str, unit: Any, kernels: KernelConfig, remat: Remat
) -> None:
    """One layer being dense."""
    config = dataclasses.replace(CONFIGS[name], d_ff=512)
    plan = make_plan(
        *(neurons(config), 0.5, 0.5),
        attention_unit=unit,
        block=kernels.block,
        dense_layers=(1,),
    )
    masks = random_masks(config, plan)
    by_kernel = in_place(config, plan, masks, Compute(remat=remat, kernels=kernels))
    by_gather = gathered(config, plan, masks)
    assert_close(by_kernel.logits, by_gather.logits, "float32", "forward")
    assert by_kernel.gradients.keys() == by_gather.gradients.keys()
    for path, gradient in by_gather.gradients.items():
        assert_close(by_kernel.gradients[path], gradient, "float32", "backward")


def test_kernel_execution_shows_the_outputs_of_what_is_kept() -> None:
    config = dataclasses.replace(CONFIGS["mha"], d_ff=256)
    plan = make_plan(*(neurons(config), 0.5, 0.5), block=64)
    masks, rows = random_masks(config, plan), batch(config)
    small, _ = compact(random_params(config), masks, plan)
    results = []
    for kernels, values in (
        (None, (small, {})),
        (KernelConfig(64, "xla"), kept_and_whole(config, plan, masks)),
    ):
        graph, _ = abstract(config, plan.segments, Compute(kernels=kernels))
        model = bind(graph, values[0] | values[1])
        hidden = model.hidden(rows.tokens, rows.segment_ids, rows.positions, ("outputs",))
        results.append(jax.tree.leaves(hidden))
    for found, desired in zip(*results, strict=True):
        assert_close(found, desired, "float32", "forward")


@pytest.mark.slow
def test_which_neurons_are_kept_matters() -> None:
    """The mask above is no ornament: another one gives other logits."""
    config, plan = CASES["query heads"]
    one, other = (masked(config, plan, random_masks(config, plan, seed)).logits for seed in (0, 1))
    assert np.abs(one - other).max() > 0.1
    assert np.abs(one - plain("gqa").logits).max() > 0.1


@pytest.mark.slow
def test_mask_and_gather_agree_in_bfloat16() -> None:
    config, plan = CASES["mha"]
    masks, compute = random_masks(config, plan), Compute(dtype="bfloat16")
    by_gather = gathered(config, plan, masks, compute)
    by_mask = masked(config, plan, masks, compute)
    assert_close(by_gather.logits, by_mask.logits, "bfloat16", "forward")
    kept, _ = compact(expand(by_mask.gradients, {}, nothing_omitted(plan), plan), masks, plan)
    for path, gradient in kept.items():
        assert gradient.dtype == jnp.float32
        assert_close(by_gather.gradients[path], gradient, "bfloat16", "backward")
