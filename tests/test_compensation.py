"""What kept neurons say for omitted ones: by hand, against NumPy, and in the steps of a run."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sat_jax.models.observe import column_products
from sat_jax.models.params import abstract, bind, numbered
from sat_jax.sparsity.compensation import compensation
from sat_jax.sparsity.masks import Masks, SegmentMasks
from sat_jax.sparsity.neurons import compact, mask_values, take_kept
from sat_jax.sparsity.plan import AttentionUnit, Plan, make_plan
from sat_jax.sparsity.statistics import Products
from sat_jax.train.probe import observed
from tests.small_models import (
    CONFIGS,
    batch,
    neurons,
    nothing_omitted,
    random_masks,
    random_params,
)
from tests.tolerances import assert_close

CONFIG = CONFIGS["gqa"]
UNITS: list[AttentionUnit] = ["kv_group", "query_head"]


def plan_of(unit: AttentionUnit, **rest: Any) -> Plan:
    return make_plan(
        *(neurons(CONFIG), 0.5, 0.5),
        **{"attention_unit": unit, "compensate": True, "dense_layers": (0,)} | rest,
    )


def products_of(columns: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Outputs of 30 tokens that depend on each other, `[L, 30, columns]`, and their products."""
    rng = np.random.default_rng(seed)
    some = rng.normal(size=(CONFIG.n_layers, 30, columns))
    seen = some @ rng.normal(size=(CONFIG.n_layers, columns, columns))
    return seen, np.einsum("LTC,LTF->LCF", seen, seen)


MIXES, OF_HEADS = products_of(CONFIG.n_heads * CONFIG.head_dim, 0)
ACTIVATIONS, OF_CHANNELS = products_of(CONFIG.d_ff, 1)
PRODUCTS = Products(jnp.asarray(OF_HEADS, jnp.float32), jnp.asarray(OF_CHANNELS, jnp.float32))
PARAMS = {path: jnp.asarray(value) for path, value in random_params(CONFIG).items()}


def test_a_probe_sums_the_products_of_all_columns() -> None:
    model = bind(abstract(CONFIG)[0], numbered(PARAMS))
    seen = observed(model, batch(CONFIG), ("outputs", "products"))
    assert seen.products is not None and seen.heads is not None
    of_channels = jnp.diagonal(seen.products.channels, axis1=1, axis2=2)
    assert_close(of_channels, seen.channels, "float32", "forward")
    shape = (CONFIG.n_layers, CONFIG.n_kv_heads, CONFIG.query_heads, CONFIG.head_dim)
    mixes = seen.products.heads.reshape(*shape, *shape[1:])
    output = PARAMS["layers/attention/output"]
    energy = jnp.einsum("LKGEKHF,LKGED,LKHFD->LKGH", mixes, output, output)
    assert_close(seen.heads, energy, "float32", "backward")
    rng = np.random.default_rng(2)
    a, weight = rng.normal(size=(2, 5, 3, 2)), rng.integers(0, 2, (2, 5))
    flat = (a * weight[..., None, None]).reshape(10, 6)
    got = column_products(jnp.asarray(a), jnp.asarray(weight))
    assert_close(got, flat.T @ flat, "float32", "forward")


def test_one_channel_speaks_for_another_by_hand() -> None:
    """Of three channels the second is kept. The first was three times it on every token, the third
    had nothing to do with it: three halves of the first's row, since the penalty is as large as
    what the second has seen itself. In the second layer it was silent, and says nothing."""
    plan = make_plan(neurons(CONFIG), 0.0, 0.5, compensate=True)
    down = jnp.asarray([[[1.0, 2.0], [0.0, 5.0], [7.0, 7.0]]] * 2)
    products = jnp.asarray([[[36.0, 12.0, 0.0], [12.0, 4.0, 0.0], [0.0, 0.0, 9.0]]] * 2)
    products = products.at[1, 1].set(0).at[1, :, 1].set(0)
    masks = (SegmentMasks(None, jnp.asarray([[1], [1]])),)
    params = {"layers/mlp/down": down, "layers/attention/output": down}
    made = compensation(params, Products(products, products), masks, plan)
    assert list(made) == ["layers/0/mlp/down_offset"]
    expected = [[[1.5, 3.0]], [[0.0, 0.0]]]
    assert_close(made["layers/0/mlp/down_offset"], expected, "float32", "forward")


@pytest.mark.parametrize("unit", UNITS)
def test_offsets_are_those_of_least_squares(unit: AttentionUnit) -> None:
    """Over the tokens that were seen, with as many more in which each kept column alone is as loud
    as in all of them together."""
    plan = plan_of(unit)
    masks = random_masks(CONFIG, plan)
    made = compensation(PARAMS, PRODUCTS, masks, plan)
    assert sorted(made) == ["layers/1/attention/output_offset", "layers/1/mlp/down_offset"]
    heads, channels = np.asarray(masks[1].heads), np.asarray(masks[1].channels)
    for place, layer in enumerate((1, 2)):
        is_kept = np.zeros((CONFIG.n_kv_heads, CONFIG.query_heads, CONFIG.head_dim), bool)
        groups = np.arange(CONFIG.n_kv_heads)[:, None]
        is_kept[heads[place] if unit == "kv_group" else (groups, heads[place])] = True
        channel_kept = np.isin(np.arange(CONFIG.d_ff), channels[place])
        for name, seen, kept in (
            ("attention/output", MIXES[layer], is_kept.reshape(-1)),
            ("mlp/down", ACTIVATIONS[layer], channel_kept),
        ):
            weights = np.asarray(PARAMS[f"layers/{name}"][layer]).reshape(-1, CONFIG.d_model)
            here, there = seen[:, kept], seen[:, ~kept]
            louder = np.diag(np.linalg.norm(here, axis=0))
            nothing = np.zeros((len(louder), there.shape[1]))
            told, *_ = np.linalg.lstsq(np.vstack([here, louder]), np.vstack([there, nothing]))
            got = made[f"layers/1/{name}_offset"][place].reshape(-1, CONFIG.d_model)
            assert_close(got, told @ weights[~kept], "float32", "backward")


def loss_and_gradients(plan: Plan, masks: Masks, offsets: Any, masked: bool) -> tuple[Any, Any]:
    """Of the parameters that are trained, those of kept neurons alone."""
    cut = nothing_omitted(plan) if masked else masks
    params, _ = compact(PARAMS, cut, plan)
    told = offsets | (mask_values(masks) if masked else {})
    graph, _ = abstract(CONFIG, plan.segments, masked=masked)

    def loss(params: Any) -> Any:
        return bind(graph, params | told).loss(*batch(CONFIG))[0]

    value, gradients = jax.jit(jax.value_and_grad(loss))(params)
    return value, take_kept(gradients, masks) if masked else gradients


@pytest.mark.parametrize("unit", UNITS)
def test_they_are_added_to_the_kept_rows_in_both_executions(unit: AttentionUnit) -> None:
    """The loss and the gradients are those of a model with these output weights."""
    plan, plain = plan_of(unit), plan_of(unit, compensate=False)
    masks = random_masks(CONFIG, plan)
    offsets = compensation(PARAMS, PRODUCTS, masks, plan)
    small, _ = compact(PARAMS, masks, plan)
    for path, offset in offsets.items():
        small[path.removesuffix("_offset")] += offset
    graph, _ = abstract(CONFIG, plain.segments)
    direct = jax.value_and_grad(lambda p: bind(graph, p).loss(*batch(CONFIG))[0])
    loss, expected = jax.jit(direct)(small)
    without, _ = loss_and_gradients(plain, masks, {}, masked=False)
    assert abs(float(loss - without)) > 1e-2
    for masked in (False, True):
        value, gradients = loss_and_gradients(plan, masks, offsets, masked)
        assert_close(value, loss, "float32", "forward")
        assert sorted(gradients) == sorted(expected)
        for path, gradient in gradients.items():
            assert_close(gradient, expected[path], "float32", "backward")


def test_what_keeps_everything_gets_nothing() -> None:
    plan = plan_of("kv_group")
    assert [segment.compensate for segment in plan.segments] == [False, True]
    assert make_plan(neurons(CONFIG), 0.0, 0.0, compensate=True) == make_plan(
        neurons(CONFIG), 0.0, 0.0
    )
