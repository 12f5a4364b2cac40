"""One step in its executions: plain, gathered and masked, with all that the optimizer keeps."""

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
from sat_jax.models.live import Live
from sat_jax.nn.decoder import Compute
from sat_jax.models.params import abstract, bind, numbered, whole
from sat_jax.ops import KernelConfig
from sat_jax.sparsity.masks import Criteria, Masks, SegmentMasks
from sat_jax.sparsity.neurons import keep_only
from sat_jax.sparsity.plan import Plan, Segment, make_plan
from sat_jax.sparsity.statistics import InputSums, Statistics
from sat_jax.train.optimizer import clipping, learning_rate, make_optimizer
from sat_jax.train.state import TrainState, compact_state, new_state, resting_params
from sat_jax.train.step import (
    StepMetrics,
    StepSettings,
    make_evaluation,
    make_step,
)
from tests.small_models import (
    CONFIGS,
    Rows,
    expand_state,
    neurons,
    random_masks,
    random_params,
)
from tests.tolerances import assert_close

CONFIG = dataclasses.replace(CONFIGS["gqa"], n_layers=2)
DENSE = make_plan(neurons(CONFIG), 0.0, 0.0, balance=2)
SPARSE = make_plan(neurons(CONFIG), 0.5, 0.5, balance=2)
OPTIMIZER = OptimizerConfig(learning_rate=1e-3, warmup_steps=2, weight_decay=0.1, clip_norm=0.5)
STEPS = 10
STATS_DECAY = 0.5

Step = Callable[..., tuple[TrainState, Statistics, StepMetrics]]

enter = jax.jit(compact_state, static_argnames="plan")
leave = jax.jit(expand_state, static_argnames="plan")


@functools.cache
def compiled(
    segments: tuple[Segment, ...],
    masked: bool,
    freeze: bool,
    microbatches: int,
    live: Live | None = None,
    kernels: KernelConfig | None = None,
) -> Step:
    """The step of one execution, jitted; compiled once for all tests."""
    settings = StepSettings(
        optimizer=make_optimizer(OPTIMIZER, STEPS),
        clip=clipping(OPTIMIZER),
        schedule=learning_rate(OPTIMIZER, STEPS),
        microbatches=microbatches,
        observe=() if live else ("inputs",),
        stats_decay=STATS_DECAY,
        freeze=freeze,
        seed=3 if live else None,
        in_place=kernels is not None,
    )
    graph, _ = abstract(CONFIG, segments, Compute(kernels=kernels), masked, live)
    return jax.jit(make_step(graph, settings))


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
    return Statistics(jnp.zeros(()), sums, sums)


def start() -> TrainState:
    return new_state(jax.tree.map(jnp.asarray, random_params(CONFIG)), make_optimizer(OPTIMIZER, 9))


def cut_only(plan: Plan) -> Masks:
    return tuple(SegmentMasks(None, None) for _ in plan.segments)


def train(
    begin: TrainState,
    plan: Plan,
    masks: Masks,
    batches: range,
    masked: bool = False,
    freeze: bool = True,
    kernels: KernelConfig | None = None,
) -> TrainState:
    """The whole state after a step on each of `batches`, between one compact and one expand."""
    step = compiled(plan.segments, masked, freeze, 1, kernels=kernels)
    masked = masked or kernels is not None
    gathered = cut_only(plan) if masked else masks
    state, resting = enter(begin, gathered, plan=plan)
    stats, masks_in_step = no_statistics(), masks if masked else ()
    beside = resting_params(resting) if any(s.forward_all for s in plan.segments) else {}
    for number in batches:
        state, stats, _ = step(state, stats, masks_in_step, rows(number), beside)
    return leave(state, resting, gathered, plan=plan)


@functools.cache
def plain(steps: int) -> TrainState:
    """The whole model after this many ordinary steps: nothing compacted, no mask anywhere."""
    step, state = compiled(DENSE.segments, False, True, 1), renamed(start(), numbered)
    for number in range(steps):
        state, _, _ = step(state, no_statistics(), (), rows(number))
    return renamed(state, whole)


def renamed(state: TrainState, rename: Callable[[Any], Any]) -> TrainState:
    """The state with other paths in everything that is keyed by path."""

    def is_keyed(node: Any) -> bool:
        return isinstance(node, dict)

    return jax.tree.map(
        lambda node: rename(node) if is_keyed(node) else node, state, is_leaf=is_keyed
    )


def equal(one: Any, other: Any) -> None:
    """The same structure, and in every leaf the same bits."""
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for (path, a), b in zip(jax.tree.leaves_with_path(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(a, b, err_msg=jax.tree_util.keystr(path), strict=True)


def close(one: TrainState, other: TrainState) -> None:
    """Equal counts; parameters and moments within the tolerances of gradients."""
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert_close(a, b, str(a.dtype), "exact" if a.dtype == jnp.int32 else "backward")


def keyed(state: TrainState) -> dict[str, dict[str, np.ndarray]]:
    """Everything that a parameter has, by name and path: its value, moments and update counts."""
    adam = state.optimizer[0]
    return {"params": state.params, "mu": adam.mu, "nu": adam.nu, "counts": adam.counts}


def changes(before: TrainState, after: TrainState, masks: Masks) -> dict[str, Any]:
    """By sort of value and path, whether anything moved in (kept, omitted) neurons."""
    found = {}
    for name, values in keyed(before).items():
        moved = {p: np.asarray(v != keyed(after)[name][p]) for p, v in values.items()}
        moved = numbered(moved) if "layers/mlp/gate" in moved else moved
        nothing = {path: np.zeros_like(m) for path, m in moved.items()}
        kept, omitted = keep(moved, nothing, masks), keep(nothing, moved, masks)
        found[name] = {p: (bool(np.any(kept[p])), bool(np.any(omitted[p]))) for p in moved}
    return found


keep = jax.jit(keep_only)
SPARSE_LEAVES = {"query", "key", "value", "output", "gate", "up", "down"}
FIRST = random_masks(CONFIG, SPARSE, seed=1)
SECOND = random_masks(CONFIG, SPARSE, seed=2)


# --- 1. nothing is lost where nothing is omitted ---


def test_gathering_everything_trains_the_plain_model_to_the_last_bit() -> None:
    everything = random_masks(CONFIG, DENSE, always=True)
    assert everything[0].channels is not None and everything[0].heads is not None
    equal(train(start(), DENSE, everything, range(3)), plain(3))


def test_a_mask_of_ones_trains_the_plain_model_to_the_last_bit() -> None:
    """The masked modules of a sparse plan, with every neuron among the kept."""
    everything = random_masks(CONFIG, DENSE, always=True)
    equal(train(start(), SPARSE, everything, range(3), masked=True), plain(3))


# --- 2. the executions agree ---


def test_gather_and_mask_train_alike_over_a_refresh() -> None:
    results = []
    for masked in (False, True):
        state = train(plain(1), SPARSE, FIRST, range(1, 3), masked=masked)
        results.append(train(state, SPARSE, SECOND, range(3, 6), masked=masked))
    close(*results)
    counts = np.asarray(keyed(results[0])["counts"]["layers/mlp/gate"])
    assert set(counts.flat) == {1, 3, 4, 6}  # a channel is kept by none, one or both masks


@pytest.mark.parametrize("unit", ["kv_group", pytest.param("query_head", marks=pytest.mark.slow)])
def test_kernels_train_as_gather_does(unit: Any) -> None:
    """In place: neither of the omitted nor of a dense layer's does a bit get lost."""
    kernels = KernelConfig(8, "xla")
    plan = make_plan(*(neurons(CONFIG), 0.5, 0.5), attention_unit=unit, block=8, dense_layers=(0,))
    one, other = (random_masks(CONFIG, plan, seed) for seed in (1, 2))
    results = []
    for how in (None, kernels):
        state = train(plain(1), plan, one, range(1, 3), kernels=how)
        results.append(train(state, plan, other, range(3, 5), kernels=how))
    close(*results)
    begin = plain(1)
    after = train(begin, plan, one, range(1, 3), kernels=kernels)
    for paths in changes(cut(begin, plan), cut(after, plan), one).values():
        for path, moved in paths.items():
            assert moved == (True, False), path


def cut(state: TrainState, plan: Plan) -> TrainState:
    return compact_state(state, cut_only(plan), plan)[0]


# --- 3. what is omitted does not move ---


@pytest.mark.parametrize("masked", [False, True])
def test_frozen_neurons_do_not_move_by_one_bit(masked: bool) -> None:
    before = plain(1)
    after = train(before, SPARSE, FIRST, range(1, 3), masked=masked)
    for paths in changes(before, after, FIRST).values():
        for path, moved in paths.items():
            assert moved == (True, False), path


@pytest.mark.parametrize("masked", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_what_a_step_itself_omits_does_not_move_by_one_bit(masked: bool) -> None:
    """And every step draws anew."""
    step = compiled(SPARSE.segments, masked, True, 1, Live(Criteria("uniform"), 2))
    begin, resting = enter(plain(1), cut_only(SPARSE), plan=SPARSE)
    end, _, metrics = step(begin, no_statistics(), (), rows(1))
    after = leave(end, resting, cut_only(SPARSE), plan=SPARSE)
    for paths in changes(plain(1), after, metrics.kept).values():
        for path, moved in paths.items():
            assert moved == (True, False), path
    _, _, again = step(end, no_statistics(), (), rows(1))
    assert not np.array_equal(metrics.kept[0].channels, again.kept[0].channels)


def test_decaying_neurons_move() -> None:
    before = plain(1)
    after = train(before, SPARSE, FIRST, range(1, 3), masked=True, freeze=False)
    for name, paths in changes(before, after, FIRST).items():
        for path, moved in paths.items():
            assert moved == (True, path.split("/")[-1] in SPARSE_LEAVES), (name, path)
    # Their gradient is zero: the moments only decay.
    assert FIRST[0].channels is not None
    zero = next(n for n in range(24) if n not in FIRST[0].channels[1])
    for name, beta in (("mu", OPTIMIZER.beta1), ("nu", OPTIMIZER.beta2)):
        old, new = (keyed(state)[name]["layers/mlp/up"][1, zero] for state in (before, after))
        assert_close(new, beta * beta * np.asarray(old), "float32", "backward")


# --- what a step is made of ---


def one_step(batch: Rows, microbatches: int = 1) -> tuple[TrainState, Statistics, StepMetrics]:
    step = compiled(DENSE.segments, False, True, microbatches)
    return step(renamed(start(), numbered), no_statistics(), (), batch)


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


def test_only_answers_are_learnt_and_every_token_counts() -> None:
    batch = rows(0)
    answers = np.asarray(batch.loss_mask & (batch.positions >= 3))
    count = int(answers.sum())
    assert 0 < count < TOKENS
    learnt = batch._replace(loss_mask=jnp.asarray(answers))
    _, _, metrics = one_step(learnt)
    assert (float(metrics.tokens), float(metrics.loss_tokens)) == (TOKENS, count)
    total, tokens = jax.jit(make_evaluation(abstract(CONFIG)[0]))(start().params, learnt)
    assert float(tokens) == count
    assert_close(metrics.loss, total / count, "float32", "forward")
    # What is not learnt is no target: another one there changes nothing.
    targets = jnp.where(answers, batch.targets, (batch.targets + 1) % CONFIG.vocab_size)
    equal(one_step(learnt._replace(targets=targets)), one_step(learnt))


def test_a_step_without_an_answer_is_finite() -> None:
    batch = rows(0)
    state, _, metrics = one_step(batch._replace(loss_mask=jnp.zeros_like(batch.loss_mask)))
    assert (float(metrics.loss), float(metrics.grad_norm)) == (0, 0)
    assert (float(metrics.tokens), float(metrics.loss_tokens)) == (TOKENS, 0)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))


def test_metrics_are_of_the_batch_before_the_update() -> None:
    state, _, metrics = one_step(rows(0))
    evaluate = jax.jit(make_evaluation(abstract(CONFIG)[0]))
    total, tokens = evaluate(start().params, rows(0))
    assert float(tokens) == TOKENS
    assert_close(metrics.loss, total / TOKENS, "float32", "forward")
    # The first moment is (1 - beta1) times the clipped gradient; the norm is of the unclipped one.
    mu = {path: np.asarray(m) for path, m in whole(keyed(state)["mu"]).items()}
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


def test_the_learning_rate_follows_the_steps() -> None:
    """After a restart too: it is the state's step that counts."""
    step, state = compiled(DENSE.segments, False, True, 1), renamed(plain(3), numbered)
    _, _, metrics = step(state, no_statistics(), (), rows(3))
    expected = learning_rate(OPTIMIZER, STEPS)(3)
    assert_close(metrics.learning_rate, expected, "float32", "backward")


# --- what is observed ---


@functools.partial(jax.jit, static_argnums=2)
def hidden(params: Any, part: Rows, observe: tuple[Any, ...]) -> Statistics:
    model = bind(abstract(CONFIG)[0], numbered(params))
    return model.hidden(part.tokens, part.segment_ids, part.positions, observe)[1]


def test_input_statistics_are_running_sums() -> None:
    step, state = compiled(DENSE.segments, False, True, 1), renamed(start(), numbered)
    once, stats, _ = step(state, no_statistics(), (), rows(0))
    _, stats, _ = step(once, stats, (), rows(1))
    seen = [
        hidden(whole(s.params), rows(number), ("inputs",)) for number, s in enumerate((state, once))
    ]
    expected = jax.tree.map(lambda first, second: STATS_DECAY * first + second, *seen)
    assert float(stats.count) == 1.5 * TOKENS
    for a, b in zip(jax.tree.leaves(stats), jax.tree.leaves(expected), strict=True):
        assert_close(a, b, "float32", "forward")
