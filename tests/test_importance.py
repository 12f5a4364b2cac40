"""Importance: every metric by hand, and the definition of statistics."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sat_jax.models.build import layout_of
from sat_jax.models.llama import LlamaConfig
from sat_jax.nn.context import Context
from sat_jax.nn.decoder import Compute
from sat_jax.nn.norms import rms_norm
from sat_jax.nn.observe import InputSums
from sat_jax.nn.rope import rotary_tables
from sat_jax.sparsity.importance import METRICS, Scores, score_inputs
from sat_jax.sparsity.statistics import Statistics, UpdateSums, accumulate, statistics_of
from tests.conftest import slow_after
from tests.small_models import CONFIGS, batch, random_params
from tests.tolerances import assert_close

KEY = jax.random.key(0)
SQRT2 = 2**0.5

TINY = LlamaConfig(
    vocab_size=3, d_model=2, n_layers=1, n_heads=4, n_kv_heads=2, head_dim=1, d_ff=2,
    max_positions=8,
)  # fmt: skip
# One layer of two KV groups of two query heads of size 1, two channels, width 2.
PARAMS = {
    f"layers/{path}": jnp.asarray([value], jnp.float32)
    for path, value in {
        "attention/query": [[[[3, 4]], [[0, -1]]], [[[1, 0]], [[2, -2]]]],
        "attention/key": [[[1, 1]], [[0, 2]]],
        "attention/value": [[[2, 0]], [[-1, 1]]],
        "attention/output": [[[[0, 1]], [[5, 12]]], [[[8, 6]], [[0, 0]]]],
        "mlp/gate": [[3, 4], [1, 0]],
        "mlp/up": [[0, -2], [2, 0]],
        "mlp/down": [[6, 8], [0, 1]],
    }.items()
}
# Over four tokens: inputs of attention with rms (2, 1) and mean (2, -1), of the MLP with rms (1, 3)
# and mean (0, 3).
STATS = Statistics(
    count=jnp.asarray(4.0),
    inputs={
        "query_head": InputSums(jnp.asarray([[16.0, 4.0]]), jnp.asarray([[8.0, -4.0]])),
        "channel": InputSums(jnp.asarray([[4.0, 36.0]]), jnp.asarray([[0.0, 12.0]])),
    },
    outputs={
        "query_head": jnp.asarray([[[[36.0, -8.0], [-8.0, 4.0]], [[16.0, 10.0], [10.0, 9.0]]]]),
        "channel": jnp.asarray([[36.0, 4.0]]),
    },
    # Norms of queries (2, 4) and (1, 3), of keys 1 and 2, and of values 3 and 1.
    norms={
        "query_head": {
            "query": jnp.asarray([[[[16.0], [64.0]], [[4.0], [36.0]]]]),
            "key": jnp.asarray([[[4.0], [16.0]]]),
            "value": jnp.asarray([[[36.0], [4.0]]]),
        },
        "channel": {"activation": jnp.asarray([[36.0, 4.0]])},
    },
    gradients={
        "query_head": jnp.asarray([[[8.0, -12.0], [2.0, 6.0]]]),
        "channel": jnp.asarray([[-20.0, 4.0]]),
    },
    updates={
        "kv_group": UpdateSums(*jnp.asarray([[[8.0, 2.0]], [[36.0, 4.0]], [[-4.0, 1.0]]])),
        "query_head": UpdateSums(
            *jnp.asarray(
                [
                    [[[4.0, 2.0], [1.0, 8.0]]],
                    [[[16.0, 64.0], [1.0, 0.0]]],
                    [[[0.0, -8.0], [2.0, 4.0]]],
                ]
            )
        ),
        "channel": UpdateSums(*jnp.asarray([[[6.0, 1.0]], [[9.0, 25.0]], [[2.0, 0.4]]])),
    },
)


def only(stats: Statistics, metric: str) -> Statistics:
    """Return only the statistics that the metric needs."""
    needs = METRICS[metric].needs
    if "inputs" not in needs:
        stats = stats._replace(inputs={})
    if not {"outputs", "predicted"} & set(needs):
        stats = stats._replace(outputs={})
    if "norms" not in needs:
        stats = stats._replace(norms={})
    if "updates" not in needs:
        stats = stats._replace(updates={})
    if "gradients" not in needs:
        stats = stats._replace(gradients={})
    return stats


def score(
    metric: str,
    unit: str,
    config: LlamaConfig = TINY,
    params: Any = PARAMS,
    stats: Statistics = STATS,
    key: jax.Array = KEY,
) -> Scores:
    inputs = score_inputs(layout_of(config), params, only(stats, metric), unit, key)
    return METRICS[metric].score(inputs)


@pytest.mark.parametrize(
    ("metric", "expected"),
    [
        ("magnitude", [5 + 1 + SQRT2 + 2 + 1 + 13, 1 + 2 * SQRT2 + 2 + SQRT2 + 10 + 0]),
        ("wanda", [10 + 1 + 3 + 4, 2 + 6 + 2 + 3]),
        ("maxip", [2 + 1 + 1 + 4, 2 + 6 + 2 + 3]),
        ("output", [(24 / 4) ** 0.5, (45 / 4) ** 0.5]),
        ("sparselora", [(2 + 4) * 1 * 3, (1 + 3) * 2 * 1]),
        ("taylor", [4 / 4, 8 / 4]),  # a mask of a group masks each of its heads
        ("gradient_l1", [2, 0.5]),
        ("gradient_l2", [3, 1]),
        ("update_gain", [-1, 0.25]),
    ],
)
def test_kv_groups_by_hand(metric: str, expected: list[float]) -> None:
    assert_close(score(metric, "kv_group"), [expected], "float32", "forward")


@pytest.mark.parametrize(
    ("metric", "expected"),
    [
        ("magnitude", [5 + 1, 1 + 13, 1 + 10, 2 * SQRT2]),
        ("wanda", [10, 1, 2, 6]),
        ("maxip", [2, 1, 2, 6]),
        ("output", [3, 1, 2, 1.5]),
        ("sparselora", [2 * 1 * 3, 4 * 1 * 3, 1 * 2 * 1, 3 * 2 * 1]),
        ("taylor", [8 / 4, 12 / 4, 2 / 4, 6 / 4]),
        ("gradient_l1", [1, 0.5, 0.25, 2]),
        ("gradient_l2", [2, 4, 0.5, 0]),
        ("update_gain", [0, -2, 0.5, 1]),
    ],
)
def test_query_heads_by_hand(metric: str, expected: list[float]) -> None:
    assert_close(score(metric, "query_head"), [expected], "float32", "forward")


@pytest.mark.parametrize(
    ("metric", "expected"),
    [
        ("magnitude", [5 + 2 + 10, 1 + 2 + 1]),
        ("wanda", [15 + 6, 1 + 2]),
        ("maxip", [12 + 6, 0]),
        ("taylor", [20 / 4, 4 / 4]),
        ("gradient_l1", [1.5, 0.25]),
        ("gradient_l2", [1.5, 2.5]),
        ("update_gain", [0.5, 0.1]),
        ("sparselora", [3, 1]),
        ("output", [30, 1]),  # rms activations 3 and 1, rows of `down` of norm 10 and 1
    ],
)
def test_channels_by_hand(metric: str, expected: list[float]) -> None:
    assert_close(score(metric, "channel"), [expected], "float32", "forward")


def test_columns_of_a_head_are_scored_one_by_one() -> None:
    """Two columns that cancel in sum do not cancel in score."""
    rows = jnp.asarray([[3.0, 4.0], [-3.0, -4.0]])[None, None]
    params = {f"layers/attention/{name}": rows[:, :, None] for name in ("query", "output")}
    config = dataclasses.replace(TINY, n_heads=1, n_kv_heads=1, head_dim=2)
    for metric, expected in {"magnitude": 20.0, "wanda": 20.0, "maxip": 4.0}.items():
        scores = score(metric, "query_head", config, params)
        assert_close(scores, [[expected]], "float32", "forward")


@pytest.mark.parametrize("metric", ["magnitude", "wanda", "maxip"])
def test_query_head_q_belongs_to_group_q_div_G(metric: str) -> None:
    config = CONFIGS["gqa"]
    params = {path: jnp.asarray(value) for path, value in random_params(config).items()}
    inputs = InputSums(*jnp.ones((2, config.n_layers, config.d_model)))
    stats = Statistics(count=jnp.asarray(2.0), inputs={"query_head": inputs})
    groups, heads = config.n_kv_heads, config.query_heads

    def scores(query: jax.Array, unit: str) -> np.ndarray:
        changed = params | {"layers/attention/query": query}
        return np.asarray(score(metric, unit, config, changed, stats))

    query = params["layers/attention/query"]
    for group, head in ((0, 0), (1, 2), (3, 1)):
        other = query.at[:, group, head].multiply(3)
        for unit, size, place in (
            ("kv_group", groups, group),
            ("query_head", groups * heads, group * heads + head),
        ):
            changed = (scores(query, unit) != scores(other, unit)).all(0)
            assert changed.nonzero()[0].tolist() == [place]
            assert changed.shape == (size,)


def test_uniform_is_new_at_every_draw() -> None:
    first, same, other = (
        score("uniform", "channel", key=key) for key in (KEY, KEY, jax.random.key(1))
    )
    assert first.shape == (1, 2)
    assert_close(first, same, "float32", "exact")
    assert (first != other).all()
    assert ((first >= 0) & (first < 1)).all()


def test_energy_below_zero_by_rounding_counts_as_none() -> None:
    heads = jnp.asarray([[[[1.0, -1.1], [-1.1, 1.0]], [[1.0, 0.0], [0.0, 3.0]]]])
    scores = score("output", "kv_group", stats=STATS._replace(outputs={"query_head": heads}))
    assert_close(scores, [[0.0, 1.0]], "float32", "forward")


# --- what a forward pass observes ---


@functools.cache
def observer(config: LlamaConfig, compute: Compute = Compute()) -> Callable[..., Any]:
    layout = layout_of(config, compute)

    def observe(rows: Any, *what: Any) -> tuple[jax.Array, Statistics]:
        model = layout.bind(random_params(config))
        x, seen = model.hidden(rows.tokens, rows.segment_ids, rows.positions, observe=what)
        return x, statistics_of(jnp.sum(rows.segment_ids > 0).astype(jnp.float32), seen)

    return jax.jit(observe, static_argnums=(1, 2))


@functools.cache
def observed(config: LlamaConfig) -> tuple[jax.Array, Statistics]:
    return observer(config)(batch(config), "inputs", "outputs")


class Parts(NamedTuple):
    """Intermediate values of one layer."""

    attention_input: jax.Array
    mix: jax.Array
    attention: jax.Array
    mlp_input: jax.Array
    activation: jax.Array
    mlp: jax.Array


@functools.partial(jax.jit, static_argnums=(0, 1))
def parts_of(graph: Any, config: LlamaConfig, state: Any, x: jax.Array) -> Parts:
    rows, block = batch(config), nnx.merge(graph, state)
    rotary = rotary_tables(config.rope, config.rotary_dim, rows.positions)
    context = Context(rows.segment_ids, rotary)
    attention_input = rms_norm(x, block.attention_norm, config.norm_eps)
    mix = block.attention.activations(attention_input, context)
    attention = block.attention(attention_input, context)
    mlp_input = rms_norm(x + attention, block.mlp_norm, config.norm_eps)
    activation = block.mlp.activations(mlp_input, context)
    mlp = block.mlp(mlp_input, context)
    return Parts(attention_input, mix, attention, mlp_input, activation, mlp)


def layer_by_layer(
    config: LlamaConfig, values: dict[str, Any], masks: Mapping[str, jax.Array] = {}
) -> Iterator[Parts]:
    """What every layer computes of the batch."""
    graph, stacked = nnx.split(layout_of(config).bind(values, masks).layers)
    x = jnp.asarray(values["embed"][batch(config).tokens])
    for layer in range(config.n_layers):
        parts = parts_of(graph, config, jax.tree.map(lambda leaf, i=layer: leaf[i], stacked), x)
        yield parts
        x = x + parts.attention + parts.mlp


REAL = np.asarray(batch(CONFIGS["mha"]).segment_ids) > 0


@pytest.mark.parametrize("name", slow_after(1, *sorted(CONFIGS)))
def test_statistics_are_naive_sums_over_tokens(name: str) -> None:
    config = CONFIGS[name]
    params = random_params(config)
    hidden, stats = observed(config)
    assert stats.count == REAL.sum() == 19
    x = params["embed"][batch(config).tokens]
    for layer, parts in enumerate(layer_by_layer(config, params)):
        x = x + parts.attention + parts.mlp
        tokens = Parts(*(np.asarray(part, np.float64)[REAL] for part in parts))
        added = np.einsum("nkge,kged->nkgd", tokens.mix, params["layers/attention/output"][layer])
        for seen, naive in (
            (stats.inputs["query_head"].square, (tokens.attention_input**2).sum(0)),
            (stats.inputs["query_head"].linear, tokens.attention_input.sum(0)),
            (stats.outputs["query_head"], np.einsum("nkgd,nkhd->kgh", added, added)),
            (stats.inputs["channel"].square, (tokens.mlp_input**2).sum(0)),
            (stats.inputs["channel"].linear, tokens.mlp_input.sum(0)),
            (stats.outputs["channel"], (tokens.activation**2).sum(0)),
        ):
            assert_close(seen[layer], naive, "float32", "forward")
    assert_close(hidden, rms_norm(x, params["final_norm"], config.norm_eps), "float32", "forward")


def test_padding_does_not_count() -> None:
    config = CONFIGS["gqa"]
    rows = batch(config)
    padding = rows.segment_ids == 0
    changed = rows._replace(
        tokens=jnp.where(padding, 7, rows.tokens), positions=jnp.where(padding, 3, rows.positions)
    )
    _, stats = observer(config)(changed, "inputs", "outputs")
    jax.tree.map(lambda a, b: assert_close(a, b, "float32", "exact"), stats, observed(config)[1])


def test_what_is_not_asked_for_is_not_observed() -> None:
    config = CONFIGS["mha"]
    nothing, inputs, outputs = (
        jax.eval_shape(lambda rows, what=what: observer(config)(rows, *what), batch(config))[1]
        for what in ((), ("inputs",), ("outputs",))
    )
    assert nothing == Statistics(count=jax.ShapeDtypeStruct((), jnp.float32))
    assert inputs._replace(inputs={}) == nothing
    assert outputs._replace(outputs={}) == nothing
    assert set(inputs.inputs) == set(outputs.outputs) == {"query_head", "channel"}


def test_statistics_in_bfloat16_are_summed_in_float32() -> None:
    config = CONFIGS["gqa"]
    observe = observer(config, Compute(dtype="bfloat16"))
    _, stats = observe(batch(config), "inputs", "outputs")
    assert {leaf.dtype for leaf in jax.tree.leaves(stats)} == {jnp.dtype("float32")}
    wide = observed(config)[1]
    jax.tree.map(lambda a, b: assert_close(a, b, "bfloat16", "forward"), stats, wide)


@pytest.mark.parametrize("unit", slow_after(1, "query_head", "kv_group", "channel"))
def test_output_is_what_masking_the_unit_removes(unit: str) -> None:
    """Root mean square, over tokens, of the difference that a mask makes to the branch."""
    # Query heads in one group of three, where a mask omits one head and not one of each group.
    config = LlamaConfig(
        vocab_size=32,
        d_model=16,
        n_layers=1,
        n_heads=3,
        n_kv_heads=1 if unit == "query_head" else 3,
        head_dim=4,
        d_ff=8,
        max_positions=32,
    )
    params = {path: jnp.asarray(value) for path, value in random_params(config).items()}
    _, stats = observed(config)
    (scores,) = score("output", unit, config, params, stats)

    def added(masks: Mapping[str, jax.Array] = {}) -> np.ndarray:
        (parts,) = layer_by_layer(config, params, masks)
        return np.asarray(parts.mlp if unit == "channel" else parts.attention, np.float64)[REAL]

    full, removed = added(), []
    lead = (1, 1) if unit == "query_head" else (1,)
    for number in range(len(scores)):
        mask = jnp.ones((*lead, len(scores))).at[..., number].set(0)
        removed.append(np.square(full - added({unit: mask})).sum(-1).mean() ** 0.5)
    assert_close(scores, removed, "float32", "forward")


def test_accumulated_statistics_are_token_weighted() -> None:
    def stats(count: float, square: float) -> Statistics:
        sums = InputSums(jnp.asarray([[square]]), jnp.asarray([[2 * square]]))
        return Statistics(jnp.asarray(count), inputs={"channel": sums})

    both = accumulate(stats(3, 12), stats(5, 4), decay=1.0)
    assert (both.count, *both.inputs["channel"]) == (8, 16, 32)
    decayed = accumulate(accumulate(stats(8, 80), stats(4, 4), decay=0.5), stats(2, 2), decay=0.5)
    # 8/4 + 4/2 + 2 tokens, the newest heaviest.
    assert (decayed.count, decayed.inputs["channel"].square) == (6, 80 / 4 + 4 / 2 + 2)


def test_statistics_of_different_things_do_not_mix() -> None:
    with pytest.raises(ValueError, match=r"channel\W+query_head"):
        accumulate(STATS._replace(outputs={}), STATS, 0.5)
    with pytest.raises(ValueError, match=r"channel\W+query_head"):
        accumulate(STATS, STATS._replace(inputs={}), 0.5)
