"""Dense tokens: those that bear loss use all channels, in both executions alike."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sat_jax.analysis.flops import training_flops
from sat_jax.config import OptimizerConfig
from sat_jax.models.llama_config import LlamaConfig
from sat_jax.models.params import abstract, bind, numbered
from sat_jax.sparsity.masks import Masks, SegmentMasks
from sat_jax.sparsity.neurons import compact, expand, mask_values
from sat_jax.sparsity.plan import Plan, make_plan
from sat_jax.sparsity.statistics import Statistics
from sat_jax.train.optimizer import clipping, learning_rate, make_optimizer
from sat_jax.train.state import compact_state, new_state
from sat_jax.train.step import StepSettings, make_step
from tests.small_models import (
    CONFIGS,
    Rows,
    batch,
    expand_state,
    neurons,
    nothing_omitted,
    random_masks,
    random_params,
)
from tests.tolerances import assert_close

CONFIG = CONFIGS["bias"]
LEARNT = np.zeros(batch(CONFIG).tokens.shape, bool)
LEARNT[0, 2:5], LEARNT[-1, 1] = True, True
ROWS: Rows = batch(CONFIG)._replace(
    loss_mask=jnp.asarray(LEARNT & (np.asarray(batch(CONFIG).segment_ids) > 0))
)
SLOTS = int(ROWS.loss_mask.sum(axis=1).max())


def planned(slots: int = SLOTS, **rest: Any) -> tuple[Plan, Masks]:
    plan = make_plan(neurons(CONFIG), 0.5, 0.5, dense_layers=(0,), dense_tokens=slots, **rest)
    return plan, random_masks(CONFIG, plan)


def gradients(
    graph: Any, params: dict[str, Any], masks: dict[str, Any], rows: Rows = ROWS
) -> tuple[jax.Array, dict[str, jax.Array]]:
    def loss(params: dict[str, Any]) -> jax.Array:
        return bind(graph, params | masks).loss(*rows)[0]

    found: tuple[jax.Array, dict[str, jax.Array]] = jax.jit(jax.value_and_grad(loss))(params)
    return found


def gathered(plan: Plan, masks: Masks) -> tuple[jax.Array, dict[str, jax.Array]]:
    small, _ = compact(random_params(CONFIG), masks, plan)
    return gradients(abstract(CONFIG, plan.segments)[0], small, {})


def test_both_executions_agree() -> None:
    for rest in ({}, {"attention_unit": "query_head", "balance": 2}):
        plan, masks = planned(**rest)
        assert [segment.dense_tokens for segment in plan.segments] == [0, SLOTS]
        loss, by_gather = gathered(plan, masks)
        cut, _ = compact(random_params(CONFIG), nothing_omitted(plan), plan)
        graph, _ = abstract(CONFIG, plan.segments, masked=True)
        expected, by_mask = gradients(graph, cut, mask_values(masks))
        assert_close(loss, expected, "float32", "forward")
        whole = expand(by_mask, {}, nothing_omitted(plan), plan)
        small, _ = compact(whole, masks, plan)
        assert small.keys() == by_gather.keys()
        for path, gradient in small.items():
            assert_close(by_gather[path], gradient, "float32", "backward")
        # Omitted channels are trained, by the tokens that bear loss.
        assert float(jnp.abs(by_gather["layers/1/omitted/mlp/down"]).sum()) > 0


def test_tokens_that_bear_loss_use_all_channels_and_no_other_does() -> None:
    """Where all do it is the model without omitted channels, where none does the sparse one."""
    plan, masks = planned(slots=ROWS.tokens.shape[1])
    graph, _ = abstract(CONFIG, plan.segments)
    small, _ = compact(random_params(CONFIG), masks, plan)
    heads = tuple(SegmentMasks(mask.heads, None) for mask in masks)
    only_heads = make_plan(neurons(CONFIG), 0.5, 0.0, dense_layers=(0,))
    ordinary = make_plan(neurons(CONFIG), 0.5, 0.5, dense_layers=(0,))

    def hidden(graph: Any, values: Any, learnt: Any) -> jax.Array:
        def run(values: Any) -> jax.Array:
            model, rows = bind(graph, values), (ROWS.tokens, ROWS.segment_ids, ROWS.positions)
            return model.hidden(*rows, learnt=learnt)[0]

        found: jax.Array = jax.jit(run)(values)
        return found

    for value, other, kept in ((True, only_heads, heads), (False, ordinary, masks)):
        learnt = jnp.full(ROWS.tokens.shape, value)
        expected = hidden(
            abstract(CONFIG, other.segments)[0], compact(random_params(CONFIG), kept, other)[0],
            learnt,
        )  # fmt: skip
        assert_close(hidden(graph, small, learnt), expected, "float32", "forward")


@pytest.mark.parametrize("balance", [1, 2])
def test_the_way_there_and_back_changes_no_bit(balance: int) -> None:
    plan, masks = planned(balance=balance)
    params = {path: jnp.asarray(value) for path, value in random_params(CONFIG).items()}
    small, resting = compact(params, masks, plan)
    kept, omitted = small["layers/1/mlp/gate"], small["layers/1/omitted/mlp/gate"]
    assert kept.shape[1] + omitted.shape[1] == CONFIG.d_ff
    moved = {path: value + 1 for path, value in small.items()}
    back = expand(moved, resting, masks, plan)
    for path, value in params.items():
        changed = back[path] == value + 1
        if path.startswith("layers/attention/") and not path.endswith("norm"):
            assert changed[0].all() and not changed[1:].all()  # omitted heads rest
        else:
            assert changed.all(), path


def test_a_step_trains_alike_in_both_executions() -> None:
    plan, masks = planned()
    optimizer_config = OptimizerConfig(learning_rate=1e-3)
    optimizer = make_optimizer(optimizer_config, 4)
    state = new_state(
        {path: jnp.asarray(value) for path, value in random_params(CONFIG).items()}, optimizer
    )
    nothing = Statistics(jnp.zeros(()))
    after = []
    for masked in (False, True):
        settings = StepSettings(
            optimizer=optimizer,
            clip=clipping(optimizer_config),
            schedule=learning_rate(optimizer_config, 4),
            microbatches=1,
            observe=(),
            stats_decay=0.0,
            freeze=True,
            freeze_channels=False,
        )
        step = jax.jit(make_step(abstract(CONFIG, plan.segments, masked=masked)[0], settings))
        moves = nothing_omitted(plan) if masked else masks
        working, resting = compact_state(state, moves, plan)
        working, _, metrics = step(working, nothing, masks if masked else (), ROWS)
        after.append((expand_state(working, resting, moves, plan), metrics))
    (gather, one), (mask, other) = after
    assert_close(one.loss, other.loss, "float32", "forward")
    for path, value in mask.params.items():
        # A first step of Adam moves what is trained by a learning rate, far above the tolerance.
        assert_close(gather.params[path], value, "float32", "forward")
        assert (gather.params[path] == state.params[path]).sum() == (
            value == state.params[path]
        ).sum()


def test_all_slots_are_counted_as_computed() -> None:
    config: LlamaConfig = CONFIG
    dense = training_flops(config, 16).all.mlp
    plan = make_plan(neurons(config), 0.0, 0.5, dense_tokens=4)
    # Half of the channels for all tokens, the other half for a quarter of them.
    assert training_flops(config, 16, plan.segments).all.mlp == dense * (0.5 + 0.5 / 4)


def test_a_whole_model_needs_no_word_on_what_is_learnt() -> None:
    graph, _ = abstract(CONFIG)
    model = bind(graph, numbered(random_params(CONFIG)))
    assert model.dense_tokens == 0
    jax.eval_shape(model.hidden, ROWS.tokens, ROWS.segment_ids, ROWS.positions)
