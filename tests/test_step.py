"""One step in each execution, with all that the optimizer keeps."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sat_jax.config import OptimizerConfig
from sat_jax.models.build import layout_of
from sat_jax.nn.observe import InputSums
from sat_jax.ops import KernelConfig
from sat_jax.sparsity.choose import Criteria
from sat_jax.sparsity.execution.base import Execution
from sat_jax.sparsity.execution.dynamic import Dynamic
from sat_jax.sparsity.execution.gather import Gather
from sat_jax.sparsity.execution.kernel import Kernel
from sat_jax.sparsity.execution.mask import Mask
from sat_jax.sparsity.execution.state import PARAMS, TrainState, new_state
from sat_jax.sparsity.plan import Passes, make_plan
from sat_jax.sparsity.rows import Kept, complement
from sat_jax.sparsity.statistics import Statistics, statistics_of
from sat_jax.train.optimizer import clipping, learning_rate, make_optimizer
from sat_jax.train.step import StepMetrics, StepSettings, make_evaluation, make_step
from tests.conftest import EMITTERS_OF_USERS
from tests.executions import equal
from tests.small_models import (
    CONFIGS,
    Rows,
    compact_state,
    expand_state,
    neurons,
    nothing_omitted,
    random_kept,
    random_params,
)
from tests.tolerances import assert_close

CONFIG = dataclasses.replace(CONFIGS["gqa"], n_layers=2)
LAYOUT = layout_of(CONFIG)
DENSE = make_plan(neurons(CONFIG), 0.0, 0.0, balance=2)
SPARSE = make_plan(neurons(CONFIG), 0.5, 0.5, balance=2)
OPTIMIZER = OptimizerConfig(learning_rate=1e-3, warmup_steps=2, weight_decay=0.1, clip_norm=0.5)
STEPS = 10
STATS_DECAY = 0.5
KERNEL = KernelConfig(8, "xla")

Step = Callable[..., tuple[TrainState, Statistics, StepMetrics]]


@functools.cache
def compiled(execution: Execution, microbatches: int = 1) -> Step:
    """The jitted step of an execution; compiled once for all tests."""
    settings = StepSettings(
        optimizer=make_optimizer(OPTIMIZER, STEPS, LAYOUT),
        clip=clipping(OPTIMIZER),
        schedule=learning_rate(OPTIMIZER, STEPS),
        microbatches=microbatches,
        observe=() if execution.selection else ("inputs",),
        stats_decay=STATS_DECAY,
        seed=3,
    )
    return jax.jit(make_step(execution, settings), compiler_options=EMITTERS_OF_USERS)


def rows(number: int) -> Rows:
    """Four rows of 8: documents of 5 and 2 tokens and one of padding, two whole ones, padding."""
    tokens = np.random.default_rng(number).integers(0, CONFIG.vocab_size, (4, 9)).astype(np.int32)
    segment_ids = np.asarray([[1] * 5 + [2] * 2 + [0], [1] * 8, [1] * 8, [0] * 8], np.int32)
    positions = np.asarray([[*range(5), *range(2), 0], [*range(8)], [*range(8)], [0] * 8], np.int32)
    arrays = (tokens[:, :-1], tokens[:, 1:], segment_ids, positions, segment_ids > 0)
    return Rows(*map(jnp.asarray, arrays))


TOKENS = 23


def no_statistics() -> Statistics:
    sums = InputSums(*[jnp.zeros((CONFIG.n_layers, CONFIG.d_model))] * 2)
    return Statistics(jnp.zeros(()), inputs={"query_head": sums, "channel": sums})


def start() -> TrainState:
    params = jax.device_put(random_params(CONFIG))
    return new_state(params, make_optimizer(OPTIMIZER, STEPS, LAYOUT))


def train(begin: TrainState, execution: Execution, kept: Kept, batches: range) -> TrainState:
    """The full state after a step on each of `batches`, between one compact and one expand."""
    step = compiled(execution)
    state, omitted = compact_state(execution, begin, kept)
    stats = no_statistics()
    for number in batches:
        state, stats, _ = step(state, stats, kept, rows(number), omitted[PARAMS])
    return expand_state(execution, state, omitted, kept)


@functools.cache
def plain(steps: int) -> TrainState:
    """The full state after this many steps of the plain model: no segments, no masks."""
    step, state = compiled(Mask(LAYOUT, DENSE)), start()
    for number in range(steps):
        state, _, _ = step(state, no_statistics(), ({},), rows(number))
    return state


def close(one: TrainState, other: TrainState) -> None:
    """Equal counts; parameters and moments within the tolerances of gradients."""
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert_close(a, b, str(a.dtype), "exact" if a.dtype == jnp.int32 else "backward")


def trees(state: TrainState) -> dict[str, dict[str, np.ndarray]]:
    """Parameters, both moments and the update counts by path."""
    adam = state.optimizer[0]
    return {"params": state.params, "mu": adam.mu, "nu": adam.nu, "counts": adam.counts}


def changes(
    before: TrainState, after: TrainState, plan: Any, kept: Kept
) -> dict[str, dict[str, tuple[bool, bool]]]:
    """By tree and path, whether any entry of kept and of omitted units changed."""
    result: dict[str, dict[str, tuple[bool, bool]]] = {}
    for name, values in trees(before).items():
        result[name] = {}
        for path, value in values.items():
            changed = np.asarray(value != trees(after)[name][path])
            if not path.startswith("layers/"):
                result[name][path] = (changed.any(), False)
                continue
            of_kept = of_omitted = False
            for segment, indices in zip(plan.segments, kept, strict=True):
                part, unit = changed[segment.start : segment.stop], LAYOUT.unit_of(path, indices)
                if unit is None:
                    of_kept |= part.any()
                    continue
                others = np.asarray(complement(indices[unit], LAYOUT.units[unit].size))
                for place in np.ndindex(others.shape[:-1]):
                    of_kept |= part[place][np.asarray(indices[unit][place])].any()
                    of_omitted |= part[place][others[place]].any()
            result[name][path] = (bool(of_kept), bool(of_omitted))
    return result


def assert_frozen(before: TrainState, after: TrainState, plan: Any, kept: Kept) -> None:
    """Fail unless kept units changed in all trees and omitted units in none, bit for bit."""
    for name, paths in changes(before, after, plan, kept).items():
        for path, changed in paths.items():
            assert changed == (True, False), (name, path)


SPARSE_LEAVES = {"query", "key", "value", "output", "gate", "up", "down"}
FIRST = random_kept(CONFIG, SPARSE, seed=1)
SECOND = random_kept(CONFIG, SPARSE, seed=2)


# --- 1. Without omitted units every execution trains the plain model ---


def test_gathering_all_units_trains_the_plain_model_bit_for_bit() -> None:
    kept = random_kept(CONFIG, DENSE, always=True)
    assert kept[0].keys() == {"kv_group", "channel"}
    equal(train(start(), Gather(LAYOUT, DENSE), kept, range(3)), plain(3))


def test_masks_of_ones_train_the_plain_model_bit_for_bit() -> None:
    kept = random_kept(CONFIG, DENSE, always=True)
    equal(train(start(), Mask(LAYOUT, SPARSE), kept, range(3)), plain(3))


# --- 2. The executions agree ---


def test_gather_and_mask_train_alike_over_a_refresh() -> None:
    results = []
    for execution in (Gather(LAYOUT, SPARSE), Mask(LAYOUT, SPARSE)):
        state = train(plain(1), execution, FIRST, range(1, 3))
        results.append(train(state, execution, SECOND, range(3, 6)))
    close(*results)
    counts = np.asarray(trees(results[0])["counts"]["layers/mlp/gate"])
    assert set(counts.flat) == {1, 3, 4, 6}  # a channel is kept in neither, one or both


@pytest.mark.parametrize("unit", ["kv_group", pytest.param("query_head", marks=pytest.mark.slow)])
def test_kernel_and_gather_train_alike_over_a_refresh(unit: Any) -> None:
    """In place; one layer is dense."""
    plan = make_plan(*(neurons(CONFIG), 0.5, 0.5), attention_unit=unit, block=8, dense_layers=(0,))
    first, second = (random_kept(CONFIG, plan, seed) for seed in (1, 2))
    results = []
    for execution in (Gather(LAYOUT, plan), Kernel(LAYOUT, plan, kernel=KERNEL)):
        state = train(plain(1), execution, first, range(1, 3))
        assert_frozen(plain(1), state, plan, first)
        results.append(train(state, execution, second, range(3, 5)))
    close(*results)


@pytest.mark.parametrize("passes", [pytest.param("backward", marks=pytest.mark.slow), "weights"])
def test_executions_with_a_dense_forward_pass_train_alike(passes: Passes) -> None:
    plan = make_plan(*(neurons(CONFIG), 0.5, 0.5), block=8)
    kept = random_kept(CONFIG, plan)
    executions: list[Execution] = [Gather(LAYOUT, plan, passes), Mask(LAYOUT, plan, passes)]
    if passes == "backward":
        executions.append(Kernel(LAYOUT, plan, passes, KERNEL))
    gather, *others = (train(plain(1), e, kept, range(1, 3)) for e in executions)
    for state in (gather, *others):
        assert_frozen(plain(1), state, plan, kept)
        close(state, gather)


# --- 3. Omitted units do not change ---


@pytest.mark.parametrize("kind", [Gather, Mask])
def test_frozen_units_do_not_change_bit_for_bit(kind: type[Execution]) -> None:
    after = train(plain(1), kind(LAYOUT, SPARSE), FIRST, range(1, 3))
    assert_frozen(plain(1), after, SPARSE, FIRST)


@pytest.mark.parametrize("masked", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_units_omitted_inside_a_step_do_not_change_bit_for_bit(masked: bool) -> None:
    """Every step selects anew. Of the two layers only the last omits units."""
    plan = make_plan(neurons(CONFIG), 0.5, 0.5, balance=2, dense_layers=(0,))
    execution = Dynamic(LAYOUT, plan, criteria=Criteria("uniform"), masked=masked)
    step, nothing = compiled(execution), nothing_omitted(plan)
    begin, omitted = compact_state(execution, plain(1), nothing)
    end, _, metrics = step(begin, no_statistics(), nothing, rows(1))
    after = expand_state(execution, end, omitted, nothing)
    assert metrics.kept[0] == {}
    assert_frozen(plain(1), after, plan, metrics.kept)
    _, _, again = step(end, no_statistics(), nothing, rows(1))
    assert not np.array_equal(metrics.kept[1]["channel"], again.kept[1]["channel"])


def test_without_freezing_the_moments_of_omitted_units_decay() -> None:
    before = plain(1)
    after = train(before, Mask(LAYOUT, SPARSE, freeze=False), FIRST, range(1, 3))
    for name, paths in changes(before, after, SPARSE, FIRST).items():
        for path, changed in paths.items():
            assert changed == (True, path.split("/")[-1] in SPARSE_LEAVES), (name, path)
    # Their gradient is 0.
    channel = next(n for n in range(24) if n not in FIRST[0]["channel"][1])
    for name, beta in (("mu", OPTIMIZER.beta1), ("nu", OPTIMIZER.beta2)):
        old, new = (trees(state)[name]["layers/mlp/up"][1, channel] for state in (before, after))
        assert_close(new, beta * beta * np.asarray(old), "float32", "backward")


# --- The parts of a step ---


def one_step(batch: Rows, microbatches: int = 1) -> tuple[TrainState, Statistics, StepMetrics]:
    return compiled(Mask(LAYOUT, DENSE), microbatches)(start(), no_statistics(), ({},), batch)


def test_microbatches_change_nothing_but_rounding() -> None:
    (state, stats, metrics), (state2, stats2, metrics2) = (
        one_step(rows(0), parts) for parts in (1, 2)
    )
    close(state2, state)
    assert_close(metrics2.loss, metrics.loss, "float32", "forward")
    assert_close(metrics2.grad_norm, metrics.grad_norm, "float32", "gradient_norm")
    assert float(metrics2.tokens) == float(metrics.tokens) == TOKENS
    assert float(stats2.count) == float(stats.count) == TOKENS
    for a, b in zip(jax.tree.leaves(stats2), jax.tree.leaves(stats), strict=True):
        assert_close(a, b, "float32", "forward")


def test_padding_changes_nothing() -> None:
    batch = rows(0)
    padding = batch.segment_ids == 0
    noise = jnp.where(padding, (batch.tokens + 7) % CONFIG.vocab_size, batch.tokens)
    positions = jnp.where(padding, 3, batch.positions)
    targets = jnp.where(padding, 1, batch.targets)
    other = batch._replace(tokens=noise, targets=targets, positions=positions)
    assert (noise != batch.tokens).sum() == 32 - TOKENS
    equal(one_step(other), one_step(batch))


def test_the_loss_is_of_masked_in_tokens_and_all_tokens_are_counted() -> None:
    batch = rows(0)
    loss_mask = np.asarray(batch.loss_mask & (batch.positions >= 3))
    count = int(loss_mask.sum())
    assert 0 < count < TOKENS
    masked = batch._replace(loss_mask=jnp.asarray(loss_mask))
    _, _, metrics = one_step(masked)
    assert (float(metrics.tokens), float(metrics.loss_tokens)) == (TOKENS, count)
    total, tokens = jax.jit(make_evaluation(LAYOUT))(start().params, masked)
    assert float(tokens) == count
    assert_close(metrics.loss, total / count, "float32", "forward")
    # A target outside the loss mask has no effect.
    targets = jnp.where(loss_mask, batch.targets, (batch.targets + 1) % CONFIG.vocab_size)
    equal(one_step(masked._replace(targets=targets)), one_step(masked))


def test_a_batch_without_loss_tokens_gives_finite_values() -> None:
    batch = rows(0)
    state, _, metrics = one_step(batch._replace(loss_mask=jnp.zeros_like(batch.loss_mask)))
    assert (float(metrics.loss), float(metrics.grad_norm)) == (0, 0)
    assert (float(metrics.tokens), float(metrics.loss_tokens)) == (TOKENS, 0)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))


def test_metrics_are_of_the_batch_before_the_update() -> None:
    state, _, metrics = one_step(rows(0))
    evaluate = jax.jit(make_evaluation(LAYOUT))
    total, tokens = evaluate(start().params, rows(0))
    assert float(tokens) == TOKENS
    assert_close(metrics.loss, total / TOKENS, "float32", "forward")
    # The first moment is (1 - beta1) times the clipped gradient; the norm is of the unclipped one.
    mu = {path: np.asarray(m) for path, m in trees(state)["mu"].items()}
    norm = math.sqrt(sum(float(np.square(m).sum()) for m in mu.values()))
    assert_close(norm / (1 - OPTIMIZER.beta1), OPTIMIZER.clip_norm, "float32", "gradient_norm")
    # The norm is the slope of the mean loss along the gradient.
    up, down = (
        evaluate({p: v + step * mu[p] / norm for p, v in random_params(CONFIG).items()}, rows(0))[0]
        for step in (0.01, -0.01)
    )
    assert round(float(up - down) / 0.02 / TOKENS / float(metrics.grad_norm), 2) == 1.0
    assert_close(metrics.learning_rate, OPTIMIZER.learning_rate / 2, "float32", "backward")
    assert int(state.step) == 1


def test_the_learning_rate_follows_the_step_of_the_state() -> None:
    _, _, metrics = compiled(Mask(LAYOUT, DENSE))(plain(3), no_statistics(), ({},), rows(3))
    expected = learning_rate(OPTIMIZER, STEPS)(3)
    assert_close(metrics.learning_rate, expected, "float32", "backward")


@jax.jit
def observe_inputs(params: Any, part: Rows) -> Statistics:
    inputs = (part.tokens, part.segment_ids, part.positions)
    _, observed = LAYOUT.bind(params).hidden(*inputs, observe=("inputs",))
    return statistics_of(jnp.sum(part.segment_ids > 0).astype(jnp.float32), observed)


def test_input_statistics_are_running_sums() -> None:
    step, state = compiled(Mask(LAYOUT, DENSE)), start()
    once, stats, _ = step(state, no_statistics(), ({},), rows(0))
    _, stats, _ = step(once, stats, ({},), rows(1))
    first, second = (observe_inputs(s.params, rows(n)) for n, s in enumerate((state, once)))
    expected = jax.tree.map(lambda a, b: STATS_DECAY * a + b, first, second)
    assert float(stats.count) == 1.5 * TOKENS
    for a, b in zip(jax.tree.leaves(stats), jax.tree.leaves(expected), strict=True):
        assert_close(a, b, "float32", "forward")
