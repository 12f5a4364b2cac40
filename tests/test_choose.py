"""Kept units: each layer's units are scored and the best are kept, for every kind of plan."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sat_jax.errors import UserError
from sat_jax.models.build import layout_of
from sat_jax.models.llama import LlamaConfig
from sat_jax.nn.observe import InputSums
from sat_jax.sparsity.choose import Criteria, choose, describe_unranked
from sat_jax.sparsity.importance import METRICS, score_inputs
from sat_jax.sparsity.plan import AttentionUnit, Plan, make_plan
from sat_jax.sparsity.rows import Kept
from sat_jax.sparsity.statistics import Statistics, UpdateSums
from sat_jax.train.probe import observe_batch
from tests.conftest import slow_after
from tests.small_models import CONFIGS, batch, neurons, random_params

CONFIG = CONFIGS["bias"]
LAYOUT = layout_of(CONFIG)
KEY = jax.random.key(4)
DETERMINISTIC = sorted(METRICS.keys() - {"uniform"})


def statistics(config: LlamaConfig, seed: int = 0) -> Statistics:
    """Random statistics; those of heads are Gram matrices, with a positive diagonal."""
    rng = np.random.default_rng(seed)
    layers, groups, heads = config.n_layers, config.n_kv_heads, config.query_heads

    def sums() -> InputSums:
        shape = (layers, config.d_model)
        return InputSums(jnp.asarray(rng.random(shape)), jnp.asarray(rng.normal(size=shape)))

    pairs = rng.normal(size=(layers, groups, heads, 5))
    return Statistics(
        jnp.asarray(7.0),
        inputs={"query_head": sums(), "channel": sums()},
        outputs={
            "query_head": jnp.asarray(pairs @ pairs.swapaxes(-1, -2)),
            "channel": jnp.asarray(rng.random((layers, config.d_ff))),
        },
        norms={
            "query_head": {
                "query": jnp.asarray(rng.random((layers, groups, heads, 4))),
                "key": jnp.asarray(rng.random((layers, groups, 4))),
                "value": jnp.asarray(rng.random((layers, groups, 4))),
            },
            "channel": {"activation": jnp.asarray(rng.random((layers, config.d_ff)))},
        },
        gradients={
            "query_head": jnp.asarray(rng.normal(size=(layers, groups, heads))),
            "channel": jnp.asarray(rng.normal(size=(layers, config.d_ff))),
        },
        updates={
            unit: UpdateSums(*jnp.asarray(rng.random((3, layers, *sizes))))
            for unit, sizes in (
                ("kv_group", (groups,)),
                ("query_head", (groups, heads)),
                ("channel", (config.d_ff,)),
            )
        },
    )


def chosen(
    plan: Plan, params: dict[str, Any], stats: Statistics, key: Any = KEY, **criteria: Any
) -> Kept:
    return choose(LAYOUT, jax.device_put(params), stats, plan, Criteria(**criteria), key).kept


def plan_of(unit: AttentionUnit = "kv_group", **rest: Any) -> Plan:
    return make_plan(neurons(CONFIG), 0.34, 0.5, attention_unit=unit, **rest)


def best(scores: np.ndarray, keep: int, parts: int = 1) -> list[Any]:
    """The `keep` highest of each part of every row, by sorting."""
    rows = scores.reshape(-1, parts, scores.shape[-1] // parts)
    order = np.sort(np.argsort(-rows)[..., : keep // parts]) + (
        np.arange(parts)[:, None] * rows.shape[-1]
    )
    return order.reshape(*scores.shape[:-1], keep).tolist()


@pytest.mark.parametrize("metric", slow_after(2, *DETERMINISTIC))
@pytest.mark.parametrize("unit", ["kv_group", "query_head"])
def test_the_best_units_of_each_layer_are_kept(metric: str, unit: AttentionUnit) -> None:
    params, stats = random_params(CONFIG), statistics(CONFIG)
    balance = 2
    plan = plan_of(unit, dense_layers=(1,), balance=balance)
    first, dense, last = chosen(plan, params, stats, metric=metric)
    assert dense == {}

    def scores_of(name: str) -> np.ndarray:
        inputs = score_inputs(LAYOUT, jax.device_put(params), stats, name, KEY)
        return np.asarray(METRICS[metric].score(inputs))

    heads, channels = scores_of(unit), scores_of("channel")
    if unit == "query_head":
        heads = heads.reshape(3, 4, 3)
    for kept, layer in ((first, 0), (last, 2)):
        assert kept.keys() == {unit, "channel"}
        expected = best(heads[layer : layer + 1], 2, balance if unit == "kv_group" else 1)
        assert kept[unit].tolist() == expected
        assert kept["channel"].tolist() == best(channels[layer : layer + 1], 12, balance)
        assert kept[unit].dtype == kept["channel"].dtype == jnp.int32


def test_channels_are_kept_in_blocks_and_heads_are_not() -> None:
    plan = plan_of(block=4, balance=2)
    (kept,) = chosen(plan, random_params(CONFIG), statistics(CONFIG))
    assert kept["kv_group"].shape == (3, 2)
    runs = np.asarray(kept["channel"]).reshape(3, -1, 4)
    assert (runs == runs[..., :1] + np.arange(4)).all()
    assert (runs[..., 0] % 4 == 0).all()


@pytest.mark.parametrize(
    ("attention", "mlp", "units"),
    [(0.0, 0.5, {"channel"}), (0.5, 0.0, {"kv_group"}), (0.0, 0.0, set())],
)
def test_units_that_are_all_kept_have_no_indices(
    attention: float, mlp: float, units: set[str]
) -> None:
    plan = make_plan(neurons(CONFIG), attention, mlp)
    (kept,) = chosen(plan, random_params(CONFIG), statistics(CONFIG))
    assert kept.keys() == units


def test_scores_that_are_no_ranking_are_reported() -> None:
    plan, stats = plan_of("query_head", dense_layers=(1,)), statistics(CONFIG)
    zeros = jax.tree.map(jnp.zeros_like, stats.gradients)
    stats = stats._replace(gradients=stats.gradients | {"query_head": zeros["query_head"]})
    choice = choose(LAYOUT, random_params(CONFIG), stats, plan, Criteria("taylor"), KEY)
    assert list(describe_unranked(choice.unranked, "taylor")) == [
        "the scores (metric 'taylor') of query_head are all equal in 2 layers, where the kept ones"
        " are drawn at random"
    ]
    stats.gradients["channel"] = stats.gradients["channel"].at[2, 3].set(jnp.nan)
    choice = choose(LAYOUT, random_params(CONFIG), stats, plan, Criteria("taylor"), KEY)
    with pytest.raises(UserError, match="of channel are not finite in 1 layers"):
        list(describe_unranked(choice.unranked, "taylor"))


@pytest.mark.parametrize(("metric", "selection"), [("uniform", "topk"), ("output", "sample")])
def test_random_choices_depend_on_the_key(metric: str, selection: str) -> None:
    plan, stats = plan_of("query_head", dense_layers=(1,)), statistics(CONFIG)
    stats = stats._replace(outputs=stats.outputs | {"channel": jnp.ones((3, 24))})

    def draw(seed: int) -> Kept:
        key, criteria = jax.random.key(seed), {"metric": metric, "selection": selection}
        return chosen(plan, random_params(CONFIG), stats, key, **criteria)

    one, same, other = draw(4), draw(4), draw(5)
    assert str(one) == str(same)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert not np.array_equal(a, b)
    # Segments and branches are drawn independently.
    assert not np.array_equal(one[0]["channel"], one[2]["channel"])


@pytest.mark.parametrize(
    "metric", slow_after(1, "taylor", *sorted(set(DETERMINISTIC) - {"taylor"}))
)
@pytest.mark.parametrize("unit", ["kv_group", "query_head"])
def test_permuted_units_are_chosen_alike(metric: str, unit: AttentionUnit) -> None:
    """Permuting a layer's units with their weights permutes the kept indices."""
    rng = np.random.default_rng(9)
    order = {
        name: rng.permutation(size)
        for name, size in (("kv_group", 4), ("query_head", 3), ("channel", 24))
    }
    params, permuted = random_params(CONFIG), {}
    for path, value in params.items():
        for name, indices in order.items():
            if name in LAYOUT.leaves[path].axes:
                value = np.take(value, indices, LAYOUT.leaves[path].axis(name))
        permuted[path] = value

    @jax.jit
    def observe(params: dict[str, Any]) -> Statistics:
        return observe_batch(LAYOUT, params, batch(CONFIG), METRICS[metric].needs)

    plan = plan_of(unit)
    (kept,) = chosen(plan, params, observe(params), metric=metric)
    (mixed,) = chosen(plan, permuted, observe(permuted), metric=metric)
    np.testing.assert_array_equal(np.sort(order["channel"][mixed["channel"]]), kept["channel"])
    expected = np.asarray(kept[unit])
    if unit == "query_head":
        expected = expected[:, order["kv_group"]]
    np.testing.assert_array_equal(np.sort(order[unit][mixed[unit]]), expected)
