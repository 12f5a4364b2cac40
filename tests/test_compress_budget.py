"""Budgets: the allocation against all choices, and the estimated increase of the loss by hand."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sat_jax.compress import Factorization, Pruning, Quantization
from sat_jax.compress.allocation import Option, allocate, lower_hull
from sat_jax.compress.budget import Budget
from sat_jax.compress.layers import matrices
from sat_jax.compress.methods import OfMatrices
from sat_jax.compress.output_gradients import output_gradients
from sat_jax.compress.sensitivity import loss_increases
from sat_jax.data.batch import Batch
from sat_jax.errors import UserError
from sat_jax.models.build import layout_of
from sat_jax.nn.loss import next_token_loss
from tests.small_models import CONFIGS, random_params
from tests.tolerances import assert_close

CONFIG = dataclasses.replace(CONFIGS["gqa"], n_layers=2)
LAYOUT = layout_of(CONFIG)


@pytest.mark.parametrize("seed", range(20))
def test_an_allocation_against_all_choices(seed: int) -> None:
    rng = np.random.default_rng(seed)
    items = [
        [Option(*rng.integers(0, 20, 2).astype(float)) for _ in range(rng.integers(1, 5))]
        for _ in range(5)
    ]
    lowest = sum(min(options).cost for options in items)
    budget = lowest + float(rng.integers(0, 30))
    chosen = allocate(items, budget)
    cost, loss = np.sum([options[n] for options, n in zip(items, chosen, strict=True)], axis=0)
    assert cost <= budget
    sums = [np.sum(choice, axis=0) for choice in itertools.product(*items)]
    best = min(total for spent, total in sums if spent <= budget)
    steps = [
        options[a].loss - options[b].loss
        for options in items
        for a, b in itertools.pairwise(lower_hull(options))
    ]
    assert loss <= best + max(steps, default=0)
    # A relaxed budget, at which all steps fit, has the smallest loss.
    everything = allocate(items, 1000.0)
    assert sum(options[n].loss for options, n in zip(items, everything, strict=True)) == sum(
        min(option.loss for option in options) for options in items
    )


def test_convex_steps_of_equal_cost_are_optimal_for_every_budget() -> None:
    items = [[Option(float(n), scale * 2.0**-n) for n in range(4)] for scale in (1, 3, 5, 0.3)]
    for budget in range(3 * len(items) + 1):
        chosen = allocate(items, budget)
        loss = sum(options[n].loss for options, n in zip(items, chosen, strict=True))
        best = min(
            sum(option.loss for option in choice)
            for choice in itertools.product(*items)
            if sum(option.cost for option in choice) <= budget
        )
        assert_close(loss, best, "float32", "forward")


def test_the_lower_hull() -> None:
    options = [Option(*pair) for pair in ((0, 8), (2, 6), (1, 4), (3, 3), (5, 3), (4, 0), (6, 1))]
    assert lower_hull(options) == [0, 2, 5]


def test_a_budget_that_nothing_meets() -> None:
    with pytest.raises(UserError, match="budget 1; accepted: 2 or more"):
        allocate([[Option(2, 0)]], 1)


def make_budget(method: OfMatrices, kind: str, share: float) -> Budget:
    return Budget(method, kind, share, LAYOUT, 8, 2)  # type: ignore[arg-type]


def even(method: OfMatrices) -> dict[str, np.ndarray]:
    """Return increases that are the same for each weight of all matrices."""
    increases = np.geomspace(1e-3, 1, len(method.varied.measured))
    if not isinstance(method, Pruning):  # more bits and higher ranks keep more
        increases = increases[::-1]
    return {m.path: np.outer(np.ones(2), increases) * m.rows * m.columns for m in matrices(LAYOUT)}


@pytest.mark.parametrize(
    ("method", "kind", "share"),
    [
        (Pruning("magnitude"), "size", 0.7),
        (Pruning("magnitude"), "flops", 0.6),
        (Factorization("svd"), "size", 0.7),
        (Quantization("rtn", group=8), "size", 0.62),
    ],
)
def test_the_cost_of_an_allocation(method: OfMatrices, kind: str, share: float) -> None:
    """It is just below the share, and equal sensitivities give equal sparsities."""
    budget = make_budget(method, kind, share)
    values = budget.allocate(even(method)).values
    used = budget.share_of(values)
    assert share - 0.02 < used <= share
    if isinstance(method, Pruning):
        uniform = budget.uniform()
        assert uniform is not None
        assert share - 0.02 < budget.share_of({path: [uniform] * 2 for path in values}) <= share
        for value in itertools.chain(*values.values()):
            assert value is not None and abs(value - uniform) <= 0.1


def test_sensitive_matrices_keep_more() -> None:
    increases = even(Pruning("magnitude"))
    increases["layers/mlp/up"][1] *= 1000
    values = make_budget(Pruning("magnitude"), "size", 0.7).allocate(increases).values
    others = [v for path, of in values.items() for v in of if path != "layers/mlp/up"]
    assert (values["layers/mlp/up"][1] or 0) < min(value or 1 for value in others)


def test_squared_gradients_of_outputs() -> None:
    """With one token, the gradient of a weight is ∂L/∂y times the input, which all outputs have."""
    params = random_params(CONFIG)
    one = np.ones((1, 1), np.int32)
    batch = Batch(3 * one, 5 * one, one, 0 * one, one.astype(bool))
    found = output_gradients(CONFIG, params, [batch, batch])
    values = {path: jnp.asarray(value) for path, value in params.items()}
    gradients = jax.grad(lambda values: next_token_loss(LAYOUT.bind(values), *batch)[0])(values)
    for matrix in matrices(LAYOUT):
        for layer in range(2):
            squares = np.square(matrix.flatten(gradients[matrix.path][layer])).sum(1)
            if (total := squares.sum()) > 1e-12:  # with one token, queries and keys have none
                shares = found[matrix.path][layer]
                assert_close(shares / shares.sum(), squares / total, "float32", "backward")
    # The gradient of the last outputs is that of the residual stream behind all layers.
    stream, _ = LAYOUT.bind(values).apply_layers(
        LAYOUT.bind(values).embed_tokens(batch.tokens, batch.positions), one, 0 * one
    )

    def loss(x: jax.Array) -> jax.Array:
        model = LAYOUT.bind(values)
        logits = model.normalize(x) @ model.head().T
        return -jax.nn.log_softmax(logits)[0, 0, 5]

    expected = 2 * np.square(jax.grad(loss)(stream))[0, 0]
    assert_close(found["layers/mlp/down"][1], expected, "float32", "backward")


def test_the_increase_of_the_loss_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half the sum of squares of the change of each output, times its mean squared gradient."""
    rng = np.random.default_rng(0)
    moments = {m.path: rng.random((2, m.rows)) for m in matrices(LAYOUT)}
    monkeypatch.setattr("sat_jax.compress.sensitivity.output_gradients", lambda *_: moments)
    params, tokens = random_params(CONFIG), rng.integers(0, 30, (2, 6))
    mask = np.ones((2, 6), bool)
    mask[:, -1] = False
    places = np.broadcast_to(np.arange(6), (2, 6))
    batch = Batch(tokens, tokens, mask.astype(np.int32), places, mask)
    methods = [Pruning("magnitude", share) for share in (0.25, 0.5)]
    found = loss_increases(CONFIG, params, [batch], methods)
    # The inputs of the first layer's query are the normed rows of the embedding.
    x = np.asarray(params["embed"])[tokens][mask].astype(np.float64)
    x = x / np.sqrt(np.square(x).mean(-1, keepdims=True) + CONFIG.norm_eps)
    x = x * np.asarray(params["layers/attention_norm"][0])
    (query,) = [m for m in matrices(LAYOUT) if m.path == "layers/attention/query"]
    weight = query.flatten(jnp.asarray(params[query.path][0]))
    for number, method in enumerate(methods):
        change = np.asarray(method.prune(weight, None)[0] - weight)  # type: ignore[arg-type]
        by_output = np.square(x @ change.T).sum(0)
        expected = by_output @ (moments[query.path][0] / 10) / 2 / 10
        assert_close(found[query.path][0][number], expected, "float32", "forward")
