"""Masks: every layer's neurons scored and the best kept, for every kind of plan."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sat_jax.models.llama import LlamaConfig
from sat_jax.models.params import abstract, bind, numbered
from sat_jax.sparsity.importance import METRICS, channel_evidence, head_evidence
from sat_jax.sparsity.masks import Criteria, Masks, choose
from sat_jax.sparsity.plan import AttentionUnit, Plan, make_plan
from sat_jax.sparsity.statistics import Gates, InputSums, Statistics
from sat_jax.train.probe import observed
from tests.small_models import CONFIGS, batch, neurons, random_params

CONFIG = CONFIGS["bias"]
KEY = jax.random.key(4)
DETERMINISTIC = sorted(METRICS.keys() - {"uniform"})


def statistics(config: LlamaConfig, seed: int = 0) -> Statistics:
    """Random ones; heads as sums of squares have them, positive on the diagonal."""
    rng = np.random.default_rng(seed)
    layers, groups, heads = config.n_layers, config.n_kv_heads, config.query_heads
    sums = [
        InputSums(
            *map(
                jnp.asarray,
                (rng.random((layers, config.d_model)), rng.normal(size=(layers, config.d_model))),
            )
        )
        for _ in range(2)
    ]
    pairs = rng.normal(size=(layers, groups, heads, 5))
    return Statistics(
        jnp.asarray(7.0),
        *sums,
        jnp.asarray(pairs @ pairs.swapaxes(-1, -2)),
        jnp.asarray(rng.random((layers, config.d_ff))),
        Gates(
            jnp.asarray(rng.normal(size=(layers, groups, heads))),
            jnp.asarray(rng.normal(size=(layers, config.d_ff))),
        ),
    )


def chosen(
    plan: Plan, params: dict[str, Any], stats: Statistics, key: Any = KEY, **criteria: Any
) -> Masks:
    params = {path: jnp.asarray(value) for path, value in params.items()}
    return choose(params, stats, plan, neurons(CONFIG), Criteria(**criteria), key)


def plan_of(unit: AttentionUnit = "kv_group", **rest: Any) -> Plan:
    return make_plan(neurons(CONFIG), 0.34, 0.5, attention_unit=unit, **rest)


def best(scores: np.ndarray, keep: int, parts: int = 1) -> list[Any]:
    """The `keep` highest of each part of every row, by sorting."""
    rows = scores.reshape(-1, parts, scores.shape[-1] // parts)
    order = np.sort(np.argsort(-rows)[..., : keep // parts]) + (
        np.arange(parts)[:, None] * rows.shape[-1]
    )
    return order.reshape(*scores.shape[:-1], keep).tolist()


@pytest.mark.parametrize("metric", DETERMINISTIC)
@pytest.mark.parametrize("unit", ["kv_group", "query_head"])
def test_the_best_of_every_layer_are_kept(metric: str, unit: AttentionUnit) -> None:
    params, stats = random_params(CONFIG), statistics(CONFIG)
    balance = 2
    plan = plan_of(unit, dense_layers=(1,), balance=balance)
    first, dense, last = chosen(plan, params, stats, metric=metric)
    assert dense == (None, None)

    arrays = {path: jnp.asarray(value) for path, value in params.items()}
    score = METRICS[metric].score
    heads = np.asarray(score(head_evidence(arrays, stats, unit, KEY)))
    channels = np.asarray(score(channel_evidence(arrays, stats, KEY)))
    if unit == "query_head":
        heads = heads.reshape(3, 4, 3)
    for mask, layer in ((first, 0), (last, 2)):
        expected = best(heads[layer : layer + 1], 2, balance if unit == "kv_group" else 1)
        assert mask.heads.tolist() == expected
        assert mask.channels.tolist() == best(channels[layer : layer + 1], 12, balance)
        assert mask.heads.dtype == mask.channels.dtype == jnp.int32


def test_channels_are_kept_in_blocks_and_heads_are_not() -> None:
    plan = plan_of(block=4, balance=2)
    (mask,) = chosen(plan, random_params(CONFIG), statistics(CONFIG))
    assert mask.heads.shape == (3, 2)
    runs = np.asarray(mask.channels).reshape(3, -1, 4)
    assert (runs == runs[..., :1] + np.arange(4)).all()
    assert (runs[..., 0] % 4 == 0).all()


@pytest.mark.parametrize(
    ("attention", "mlp", "whole"), [(0.0, 0.5, "heads"), (0.5, 0.0, "channels"), (0.0, 0.0, "both")]
)
def test_what_is_kept_whole_has_no_mask(attention: float, mlp: float, whole: str) -> None:
    plan = make_plan(neurons(CONFIG), attention, mlp)
    (mask,) = chosen(plan, random_params(CONFIG), statistics(CONFIG))
    assert (mask.heads is None) == (whole in ("heads", "both"))
    assert (mask.channels is None) == (whole in ("channels", "both"))


@pytest.mark.parametrize(("metric", "selection"), [("uniform", "topk"), ("output", "sample")])
def test_random_choices_come_from_the_key(metric: str, selection: str) -> None:
    plan = plan_of("query_head", dense_layers=(1,))
    stats = statistics(CONFIG)._replace(channels=jnp.ones((3, 24)))
    draw = lambda key: chosen(  # noqa: E731
        plan, random_params(CONFIG), stats, metric=metric, selection=selection, key=key
    )
    one, same, other = draw(KEY), draw(jax.random.key(4)), draw(jax.random.key(5))
    assert str(one) == str(same)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert not np.array_equal(a, b)
    # Segments and modules are drawn apart.
    assert not np.array_equal(one[0].channels, one[2].channels)


@pytest.mark.parametrize("metric", DETERMINISTIC)
@pytest.mark.parametrize("unit", ["kv_group", "query_head"])
def test_shuffled_neurons_are_chosen_alike(metric: str, unit: AttentionUnit) -> None:
    """Invariant: shuffling a layer's neurons with their weights shuffles what is kept."""
    rng = np.random.default_rng(9)
    groups, heads, channels = rng.permutation(4), rng.permutation(3), rng.permutation(24)
    params, shuffled = random_params(CONFIG), {}
    for path, value in params.items():
        if path.startswith("layers/mlp/"):
            value = value[:, channels]
        elif path.startswith("layers/attention/") and not path.endswith("norm"):
            value = value[:, groups]
            if path.rsplit("/", 1)[-1] in ("query", "output", "query_bias"):
                value = value[:, :, heads]
        shuffled[path] = value

    graph, _ = abstract(CONFIG)

    @jax.jit
    def seen(params: dict[str, Any]) -> Statistics:
        return observed(bind(graph, numbered(params)), batch(CONFIG), METRICS[metric].needs)

    plan = plan_of(unit)
    (plain,) = chosen(plan, params, seen(params), metric=metric)
    (mixed,) = chosen(plan, shuffled, seen(shuffled), metric=metric)
    np.testing.assert_array_equal(np.sort(channels[mixed.channels]), plain.channels)
    if unit == "kv_group":
        np.testing.assert_array_equal(np.sort(groups[mixed.heads]), plain.heads)
    else:
        np.testing.assert_array_equal(
            np.sort(heads[mixed.heads]), np.asarray(plain.heads)[:, groups]
        )
