"""Least-squares correction: by hand, against NumPy, and in the executions."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from sat_jax.models.build import layout_of
from sat_jax.models.retnet import RetNetConfig
from sat_jax.nn.observe import column_products
from sat_jax.sparsity.correction import least_squares_correction
from sat_jax.sparsity.execution.gather import Gather
from sat_jax.sparsity.execution.mask import Mask
from sat_jax.sparsity.plan import AttentionUnit, Plan, make_plan
from sat_jax.train.probe import observe_batch
from tests.executions import assert_gradients_close, kept_rows, run
from tests.small_models import CONFIGS, batch, neurons, random_kept, random_params
from tests.tolerances import assert_close

CONFIG = CONFIGS["gqa"]
# With as many columns of channels, and of heads together, as `CONFIG`.
RETNET = RetNetConfig(
    vocab_size=32, d_model=16, n_layers=3, n_heads=4, d_value=48, d_ff=24, max_positions=32
)
LAYOUT = layout_of(CONFIG)
UNITS: list[AttentionUnit] = ["kv_group", "query_head"]
OUTPUT, DOWN = "layers/attention/output", "layers/mlp/down"
RETENTION_OUTPUT = "layers/retention/output"


def plan_of(unit: AttentionUnit, **rest: Any) -> Plan:
    return make_plan(neurons(CONFIG), 0.5, 0.5, attention_unit=unit, dense_layers=(0,), **rest)


def products_of(columns: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Correlated outputs of 30 tokens, `[L, 30, columns]`, and their products."""
    rng = np.random.default_rng(seed)
    independent = rng.normal(size=(CONFIG.n_layers, 30, columns))
    outputs = independent @ rng.normal(size=(CONFIG.n_layers, columns, columns))
    return outputs, np.einsum("LTC,LTF->LCF", outputs, outputs)


MIXES, OF_HEADS = products_of(CONFIG.n_heads * CONFIG.head_dim, 0)
ACTIVATIONS, OF_CHANNELS = products_of(CONFIG.d_ff, 1)
PRODUCTS = {
    "query_head": jnp.asarray(OF_HEADS, jnp.float32),
    "channel": jnp.asarray(OF_CHANNELS, jnp.float32),
}
PARAMS = {path: jnp.asarray(value) for path, value in random_params(CONFIG).items()}


def test_a_probe_sums_the_products_of_all_columns() -> None:
    stats = observe_batch(LAYOUT, PARAMS, batch(CONFIG), ("outputs", "products"))
    of_channels = jnp.diagonal(stats.products["channel"], axis1=1, axis2=2)
    assert_close(of_channels, stats.outputs["channel"], "float32", "forward")
    shape = (CONFIG.n_layers, CONFIG.n_kv_heads, CONFIG.query_heads, CONFIG.head_dim)
    mixes, output = stats.products["query_head"].reshape(*shape, *shape[1:]), PARAMS[OUTPUT]
    energy = jnp.einsum("LKGEKHF,LKGED,LKHFD->LKGH", mixes, output, output)
    assert_close(stats.outputs["query_head"], energy, "float32", "backward")
    rng = np.random.default_rng(2)
    a, weight = rng.normal(size=(2, 5, 3, 2)), rng.integers(0, 2, (2, 5))
    flat = (a * weight[..., None, None]).reshape(10, 6)
    products = column_products(jnp.asarray(a), jnp.asarray(weight))
    assert_close(products, flat.T @ flat, "float32", "forward")


def test_a_probe_of_retention_sums_the_products_of_all_columns() -> None:
    params = {path: jnp.asarray(value) for path, value in random_params(RETNET).items()}
    stats = observe_batch(layout_of(RETNET), params, batch(RETNET), ("outputs", "products"))
    heads, columns = RETNET.n_heads, RETNET.d_value // RETNET.n_heads
    shape, output = (RETNET.n_layers, heads, columns, heads, columns), params[RETENTION_OUTPUT]
    products = stats.products["head"].reshape(shape)
    energy = jnp.einsum("LHEGF,LHED,LGFD->LHG", products, output, output)
    assert_close(stats.outputs["head"], energy, "float32", "backward")


def test_one_channel_is_corrected_for_another_by_hand() -> None:
    """The second of three channels is kept. The first was three times as large on every token, the
    third was orthogonal to it: the correction is 3/2 of the first row, since the penalty equals the
    sum of squares of the second. In the second layer the second channel was 0: no correction."""
    plan = make_plan(neurons(CONFIG), 0.0, 0.5)
    down = jnp.asarray([[[1.0, 2.0], [0.0, 5.0], [7.0, 7.0]]] * 2)
    products = jnp.asarray([[[36.0, 12.0, 0.0], [12.0, 4.0, 0.0], [0.0, 0.0, 9.0]]] * 2)
    products = products.at[1, 1].set(0).at[1, :, 1].set(0)
    kept = ({"channel": jnp.asarray([[1], [1]])},)
    of_units = {"query_head": products, "channel": products}
    corrections = least_squares_correction(LAYOUT, {DOWN: down, OUTPUT: down}, of_units, kept, plan)
    assert list(corrections) == [DOWN]
    (correction,) = corrections[DOWN]
    assert_close(correction, [[[1.5, 3.0]], [[0.0, 0.0]]], "float32", "forward")


def head_columns_kept(unit: str, indices: np.ndarray) -> np.ndarray:
    """Which columns of the activations of heads in one layer are kept."""
    if unit == "head":
        is_kept = np.zeros((RETNET.n_heads, RETNET.d_value // RETNET.n_heads), bool)
        is_kept[indices] = True
        return is_kept.reshape(-1)
    is_kept = np.zeros((CONFIG.n_kv_heads, CONFIG.query_heads, CONFIG.head_dim), bool)
    groups = np.arange(CONFIG.n_kv_heads)[:, None]
    is_kept[indices if unit == "kv_group" else (groups, indices)] = True
    return is_kept.reshape(-1)


@pytest.mark.parametrize("unit", [*UNITS, "head"])
def test_corrections_solve_the_penalised_least_squares_problem(unit: Any) -> None:
    """Over the observed tokens, and one more token for each kept column, on which that column alone
    has the norm that it has over all of them."""
    if unit == "head":
        config, output, products = RETNET, RETENTION_OUTPUT, {**PRODUCTS}
        products["head"] = products.pop("query_head")
        plan = make_plan(neurons(config), 0.5, 0.5, dense_layers=(0,))
    else:
        config, output, products, plan = CONFIG, OUTPUT, PRODUCTS, plan_of(unit)
    params = {path: jnp.asarray(value) for path, value in random_params(config).items()}
    kept = random_kept(config, plan)
    corrections = least_squares_correction(layout_of(config), params, products, kept, plan)
    assert sorted(corrections) == sorted([output, DOWN])
    assert all(parts[0] is None for parts in corrections.values())  # the first layer is dense
    heads, channels = np.asarray(kept[1][unit]), np.asarray(kept[1]["channel"])
    for place, layer in enumerate((1, 2)):
        channel_is_kept = np.isin(np.arange(CONFIG.d_ff), channels[place])
        for path, outputs, mask in (
            (output, MIXES[layer], head_columns_kept(unit, heads[place])),
            (DOWN, ACTIVATIONS[layer], channel_is_kept),
        ):
            weights = np.asarray(params[path][layer]).reshape(-1, CONFIG.d_model)
            inputs, targets = outputs[:, mask], outputs[:, ~mask]
            penalty = np.diag(np.linalg.norm(inputs, axis=0))
            zeros = np.zeros((len(penalty), targets.shape[1]))
            solution, *_ = np.linalg.lstsq(
                np.vstack([inputs, penalty]), np.vstack([targets, zeros]), rcond=None
            )
            part = corrections[path][1]
            assert part is not None
            actual = part[place].reshape(-1, CONFIG.d_model)
            assert_close(actual, solution @ weights[~mask], "float32", "backward")


@pytest.mark.slow
@pytest.mark.parametrize("unit", UNITS)
def test_corrections_are_added_to_kept_rows_in_gather_and_mask(unit: AttentionUnit) -> None:
    """Logits and gradients are those of a model with the corrected output weights."""
    plan = plan_of(unit)
    kept, gather = random_kept(CONFIG, plan), Gather(LAYOUT, plan)
    corrections = least_squares_correction(LAYOUT, PARAMS, PRODUCTS, kept, plan)
    compact, omitted = gather.compact(PARAMS, kept)
    for path, parts in corrections.items():
        compact[path] = tuple(
            rows if more is None else rows + more
            for rows, more in zip(compact[path], parts, strict=True)
        )
    expected = run(gather, gather.expand(compact, omitted, kept), kept)
    without = run(gather, PARAMS, kept)
    assert np.abs(np.asarray(expected.logits - without.logits)).max() > 1e-2
    for execution in (gather, Mask(LAYOUT, plan)):
        result = run(execution, PARAMS, kept, corrections=corrections)
        assert_close(result.logits, expected.logits, "float32", "forward")
        gradients = result.gradients
        if isinstance(execution, Mask):
            gradients = kept_rows(LAYOUT, plan, gradients, kept)
        assert_gradients_close(gradients, expected.gradients)


def test_a_plan_that_omits_nothing_has_no_correction() -> None:
    plan = make_plan(neurons(CONFIG), 0.0, 0.0)
    assert least_squares_correction(LAYOUT, PARAMS, PRODUCTS, ({},), plan) == {}
