"""Weight gradients from a sample of the tokens."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sat_jax.models.build import layout_of
from sat_jax.nn.linear import combine, project
from sat_jax.nn.sampled_tokens import SampledTokens, inclusion_probabilities
from sat_jax.sparsity.execution.gather import Gather
from sat_jax.sparsity.flops import forward_flops, traced_flops, training_flops
from sat_jax.sparsity.token_sampling import sample_tokens, token_key
from tests.executions import ROWS, differentiate
from tests.small_models import CONFIGS, random_params
from tests.test_flops import COMPUTED, GQA, LAYOUT, PLANS, REMATS, TOKENS, Traced
from tests.tolerances import assert_close


def test_inclusion_probabilities_by_hand() -> None:
    """In proportion to the norms, but at most 1, with the sum 2."""
    norms = jnp.asarray([[8.0, 1, 1, 2, 0], [1, 1, 1, 1, 1], [0, 3, 0, 0, 0], [0, 0, 0, 0, 0]])
    expected = [[1, 0.25, 0.25, 0.5, 0], [0.4] * 5, [0, 1, 0, 0, 0], [0] * 5]
    assert_close(inclusion_probabilities(norms, 2), expected, "float32", "forward")


@pytest.mark.parametrize("product", [project, combine])
def test_the_gradient_is_that_of_all_tokens_in_the_mean(product: Any) -> None:
    """Within five standard errors of each entry; half of the tokens are sampled."""
    rng, samples = np.random.default_rng(0), 4000
    w = rng.normal(size=(2, 2, 3))
    x = rng.normal(size=(2, 6, 3) if product is project else (2, 6, 2, 2))
    x[0] *= np.asarray([9, 1, 1, 2, 0, 1]).reshape(6, *(1,) * (x.ndim - 2))
    w, x = (jnp.asarray(value, jnp.float32) for value in (w, x))
    y, of_all = jax.vjp(product, w, x)
    dy = jax.random.normal(jax.random.key(1), y.shape)
    expected_w, expected_x = of_all(dy)

    def estimate(key: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        def of_sample(array: jax.Array, x: jax.Array) -> jax.Array:
            return product(SampledTokens(array, jax.random.key_data(key), 0.5), x)

        y, gradient = jax.vjp(of_sample, w, x)
        return (y, *gradient(dy))

    outputs, weights, inputs = jax.jit(jax.vmap(estimate))(
        jax.random.split(jax.random.key(2), samples)
    )
    assert_close(outputs[0], y, "float32", "forward")
    assert_close(inputs[0], expected_x, "float32", "backward")
    assert float(weights.std(0).max()) > 0.1
    error = weights.std(0) / samples**0.5
    assert float((jnp.abs(weights.mean(0) - expected_w) / (error + 1e-6)).max()) < 5


def test_a_token_is_as_likely_as_its_term_is_large() -> None:
    """Divided by their probabilities, all terms have the same norm: the sum of all norms."""
    rng = np.random.default_rng(1)
    x, dy = (jnp.asarray(rng.normal(size=(1, 4, 3)), jnp.float32) for _ in range(2))
    norms = np.linalg.norm(x[0], axis=-1) * np.linalg.norm(dy[0], axis=-1)

    def estimate(key: jax.Array) -> jax.Array:
        weight = SampledTokens(jnp.zeros((3, 3)), jax.random.key_data(key), 0.75)
        return weight.gradient(x, dy).array

    estimates = jax.jit(jax.vmap(estimate))(jax.random.split(jax.random.key(0), 64))
    assert len({float(e[0, 0]) for e in estimates}) == 4
    actual = np.linalg.norm(estimates, axis=(1, 2))
    assert_close(actual, np.full(64, norms.sum()), "float32", "backward")


def test_every_matrix_and_layer_has_its_own_random_key() -> None:
    model: Any = LAYOUT.bind({p: jnp.zeros(s.shape) for p, s in LAYOUT.shapes.items()})
    sample_tokens(model.layers, 0.5, jax.random.key(0))
    matrices = (model.layers.attention.query, model.layers.attention.output, model.layers.mlp.up)
    keys = np.concatenate([matrix.get_value().key for matrix in matrices])
    assert len(np.unique(keys, axis=0)) == 3 * GQA.n_layers


def differ(one: Any, other: Any) -> bool:
    return bool(np.abs(one - other).max() > 0.01 * np.abs(other).max())


def test_only_matrices_of_branches_have_estimated_gradients() -> None:
    config = CONFIGS["bias"]
    layout, params = layout_of(config), jax.device_put(random_params(config))

    def run(rate: float, step: int) -> Any:
        def bind(trained: Any) -> Any:
            model = layout.bind(trained)
            if rate:
                sample_tokens(model.layers, rate, token_key(0, jnp.asarray(step)))
            return model

        return jax.jit(lambda params: differentiate(bind, params))(params)

    dense, one, other = run(0.0, 0), run(0.5, 0), run(0.5, 1)
    assert ROWS.tokens.shape == (3, 10)
    assert_close(one.logits, dense.logits, "float32", "forward")
    for path, expected in dense.gradients.items():
        leaf = layout.leaves[path]
        if leaf.in_layers and leaf.role in ("read", "write"):
            for layer in range(config.n_layers):
                gradient = one.gradients[path][layer]
                assert differ(gradient, expected[layer]), path
                assert differ(gradient, other.gradients[path][layer]), path
        else:
            assert_close(one.gradients[path], expected, "float32", "backward")


class Sampled(Traced):
    """A plan's programs with half of the tokens in weight gradients."""

    def bind(self, trained: Any, values: Any) -> Any:
        model = super().bind(trained, values)
        sample_tokens(model.layers, 0.5, jax.random.key(0))
        return model


@pytest.mark.parametrize("remat", REMATS)
def test_flops_of_sampled_tokens(remat: Any) -> None:
    plan = PLANS["groups"]
    traced = traced_flops(*Sampled(GQA, plan, Gather, remat).step)
    dense = training_flops(LAYOUT, COMPUTED, plan, remat).total
    saved = forward_flops(LAYOUT, COMPUTED, plan).products / 2
    assert_close(traced, TOKENS * (dense - saved), "float64", "forward")
    # Rows of 64 tokens, of which 16 are sampled; the backward pass of MLPs is dropped half of the
    # time. For products with weights alone the bound is 3 / (2 + k).
    one, mlp = forward_flops(LAYOUT, 64), 3 * 2 * 3 * 24 * 16
    total = training_flops(LAYOUT, 64).total
    sampled = training_flops(LAYOUT, 64, token_rate=0.75).total
    assert_close(total - sampled, 0.75 * one.products, "float64", "forward")
    rates = (("mlp", (0.5,) * 3),)
    both = training_flops(LAYOUT, 64, token_rate=0.75, dropped=rates).total
    assert_close(sampled - both, 0.5 * (1 + 0.25) * mlp, "float64", "forward")
