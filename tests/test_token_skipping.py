"""Tokens that skip layers."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sat_jax.config import OptimizerConfig
from sat_jax.data.batch import Batch
from sat_jax.errors import UserError
from sat_jax.models.build import layout_of
from sat_jax.models.retnet import RetNetConfig
from sat_jax.nn.context import Context
from sat_jax.nn.rope import rotary_tables
from sat_jax.nn.stack import scan_layers
from sat_jax.sparsity.execution.gather import Gather
from sat_jax.sparsity.execution.state import new_state
from sat_jax.sparsity.flops import forward_flops, speedup_bound, traced_flops, training_flops
from sat_jax.sparsity.plan import Segment, make_plan
from sat_jax.sparsity.statistics import Statistics
from sat_jax.sparsity.token_skipping import draw_tokens, random_tokens
from sat_jax.train.optimizer import clipping, learning_rate, make_optimizer
from sat_jax.train.setup import controller_of
from sat_jax.train.step import StepSettings, make_step
from tests.executions import ROWS, assert_gradients_close, equal
from tests.small_models import neurons, random_params
from tests.test_flops import COMPUTED, GQA, LAYOUT, LENGTH, TOKENS, Traced, segment
from tests.test_knobs import MODEL, config_with
from tests.tolerances import assert_close

CONFIG = dataclasses.replace(GQA, n_layers=1)
LAYER = layout_of(CONFIG)
NEURONS = neurons(GQA)
HALF = make_plan(NEURONS, 0.0, 0.0, token_skip_rate=0.5)
PADDED = jnp.asarray([[1] * 6 + [2] * 3 + [0], [1] * 3 + [0] * 7])


def test_places_are_random_tokens_and_then_padding() -> None:
    places = np.asarray(random_tokens(jax.random.key(0), 200, 5, PADDED))
    assert places.shape == (200, 2, 5)
    assert (np.diff(places) > 0).all()
    chosen = [np.bincount(row.ravel(), minlength=10) for row in places.swapaxes(0, 1)]
    assert chosen[0][9] == 0 and (chosen[1][:3] == 200).all()
    # Four standard errors of a binomial count at 5 of 9, and at 2 of 7.
    for counts, share in ((chosen[0][:9], 5 / 9), (chosen[1][3:], 2 / 7)):
        error = (200 * share * (1 - share)) ** 0.5
        assert np.abs(counts - 200 * share).max() < 4 * error


def test_draws_differ_between_layers_steps_and_seeds_and_repeat() -> None:
    plan = make_plan(dataclasses.replace(NEURONS, layers=5), 0.0, 0.0, token_skip_rate=0.5)
    segment_ids = jnp.ones((4, 16), jnp.int32)

    def draw(seed: int, step: int) -> Any:
        first, places, last = draw_tokens(plan, seed, jnp.asarray(step), segment_ids)
        assert first is last is None and places is not None
        return np.asarray(places)

    one = draw(0, 0)
    assert one.shape == (3, 4, 8)
    assert len({row.tobytes() for row in one.reshape(12, 8)}) == 12
    equal(draw(0, 0), one)
    assert (draw(0, 1) != one).any() and (draw(1, 0) != one).any()
    assert draw_tokens(make_plan(NEURONS, 0.0, 0.0), 0, jnp.asarray(0), segment_ids) == ()


@pytest.mark.slow
def test_a_layer_is_applied_to_shorter_rows_and_others_pass_it_unchanged() -> None:
    """Outputs and gradients of one layer; a cotangent of the tokens that skip it alone gives its
    parameters no gradient."""
    params = jax.device_put(random_params(CONFIG))
    rng = np.random.default_rng(0)
    x, cotangent = (rng.normal(size=(3, 10, CONFIG.d_model)).astype(np.float32) for _ in range(2))
    places = random_tokens(jax.random.key(4), 1, 5, ROWS.segment_ids)
    tables = rotary_tables(CONFIG.rope, CONFIG.rotary_dim, ROWS.positions)
    chosen = np.arange(3)[:, None], np.asarray(places[0])
    skips = np.ones((3, 10), bool)
    skips[chosen] = False

    @jax.jit
    def run(x: Any, cotangent: Any, segment_ids: Any, tables: Any, layer_tokens: Any) -> Any:
        context = Context(segment_ids, tables, layer_tokens=layer_tokens)

        def layers(params: Any, x: Any) -> jax.Array:
            return scan_layers(LAYER.bind(params).layers, x, context, dtype="float32")[0]

        y, gradients = jax.vjp(layers, params, x)
        return y, *gradients(cotangent)

    rows = (ROWS.segment_ids, tables, (places,))
    short_rows = (ROWS.segment_ids[chosen], tuple(table[chosen] for table in tables), ())
    y, gradients, dx = run(x, cotangent, *rows)
    short_y, short_gradients, short_dx = run(x[chosen], cotangent[chosen], *short_rows)
    equal(y[chosen], short_y)
    equal(y[skips], jnp.asarray(x[skips]))
    assert_gradients_close(gradients, short_gradients)
    assert_close(dx[chosen], short_dx, "float32", "backward")
    equal(dx[skips], jnp.asarray(cotangent[skips]))
    _, nothing, _ = run(x, cotangent * skips[..., None], *rows)
    assert any(map(np.any, gradients.values())) and not any(map(np.any, nothing.values()))


COUNTS = (segment(0, 1, 4, 3, 24), segment(1, 2, 2, 3, 8), segment(2, 3, 4, 3, 24))
SKIPPED = (COUNTS[0], dataclasses.replace(COUNTS[1], token_skip_rate=0.5), COUNTS[2])


def test_flops_of_tokens_that_skip() -> None:
    """Half of the tokens, which meet half as many: the layers cost half of those of rows of 20."""
    options: dict[str, Any] = {"remat": "full", "passes": "weights"}
    model = Traced(GQA, SKIPPED, lambda layout, plan: Gather(layout, plan, "weights"), "full")
    optimizer = make_optimizer(OptimizerConfig(), 1, LAYOUT)
    schedule = learning_rate(OptimizerConfig(), 1)
    settings = StepSettings(optimizer, clipping(OptimizerConfig()), schedule)
    state = jax.eval_shape(lambda params: new_state(params, optimizer), model.values[0])
    batch = Batch(*[model.tokens] * 4, model.mask)
    step, stats = make_step(model.execution, settings), Statistics(jnp.zeros(()))
    traced = traced_flops(step, state, stats, model.kept, batch, model.values[1])
    head = 3 * forward_flops(LAYOUT, 1).head

    def layers(length: int, *segments: Segment) -> float:
        return training_flops(LAYOUT, length, segments, **options).total - head

    every, some = COUNTS[::2], COUNTS[1]
    expected = head + layers(COMPUTED, *every) + layers(LENGTH - 1, some) / 2
    assert_close(traced, TOKENS * expected, "float64", "forward")
    expected = head + layers(64, *every) + layers(32, some) / 2
    assert_close(head + layers(64, *SKIPPED), expected, "float64", "forward")


def test_the_bound_by_hand() -> None:
    """Without attention and head the middle one of three layers would be half as expensive: 6/5."""
    one, products = forward_flops(LAYOUT, 64), 3 * forward_flops(LAYOUT, 64).products
    mixing = 3.5 * one.mixing
    # Of 64 queries, 32 meet 16.5 instead of 32.5 keys on average.
    less = products / 3 / 2 + mixing / 3 * (1 - 0.5 * 16.5 / 32.5)
    total = products + mixing + 3 * one.head
    bound = speedup_bound(LAYOUT, 64, HALF.segments)
    assert_close(bound, total / (total - less), "float64", "forward")
    assert_close(products / (products - products / 3 / 2), 6 / 5, "float64", "forward")


def test_layers_that_tokens_skip() -> None:
    def runs(layers: int, **options: Any) -> list[tuple[int, int, float]]:
        some = dataclasses.replace(NEURONS, layers=layers)
        segments = make_plan(some, 0.0, 0.0, token_skip_rate=0.3, **options).segments
        return [(s.start, s.stop, s.token_skip_rate) for s in segments]

    assert runs(5) == [(0, 1, 0.0), (1, 4, 0.3), (4, 5, 0.0)]
    assert runs(5, dense_layers=(1, -1)) == [(0, 2, 0.0), (2, 4, 0.3), (4, 5, 0.0)]
    assert [HALF.segments[1].tokens(length) for length in (1, 2, 7, 8)] == [1, 1, 4, 4]
    for layers, dense in ((2, ()), (3, (1,))):
        with pytest.raises(UserError, match=r"^sparsity.token_skip_rate 0\.3: tokens can skip no"):
            runs(layers, dense_layers=dense)


def test_the_ladder_ends_with_all_tokens() -> None:
    changes = {"sparsity.rate": 0.0, "sparsity.token_skip_rate": 0.5}
    config = config_with(changes | {"sparsity.rungs": 4, "train.steps": 16})
    model = dataclasses.replace(MODEL, n_layers=4)
    rungs = controller_of(config, model).rungs
    assert [rung.rate for rung in rungs] == [0.5, 0.375, 0.25, 0.125, 0.0][-len(rungs) :]
    assert [len(rung.plan.segments) for rung in rungs] == [3] * (len(rungs) - 1) + [1]
    assert config.omitted_share == 0.5


def test_retention_is_refused() -> None:
    sizes = {"vocab_size": 64, "d_model": 16, "n_layers": 3, "d_ff": 32, "max_positions": 64}
    model = RetNetConfig(**sizes, n_heads=4, d_value=32, chunk=8)
    config = config_with({"sparsity.rate": 0.0, "sparsity.token_skip_rate": 0.5})
    with pytest.raises(UserError, match=r"^sparsity\.token_skip_rate 0\.5: retention decays"):
        controller_of(config, model)
