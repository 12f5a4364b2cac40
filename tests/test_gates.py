"""Gates: factors on neurons, and the gradient that the metric `taylor` takes from them."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sat_jax.models.llama import LlamaConfig
from sat_jax.models.params import abstract, bind, numbered
from sat_jax.sparsity.neurons import compact, mask_values
from sat_jax.sparsity.plan import make_plan
from sat_jax.sparsity.statistics import Gates, Statistics
from sat_jax.train.probe import ProbeSettings, make_probe
from tests.small_models import (
    CONFIGS,
    batch,
    neurons,
    nothing_omitted,
    random_masks,
    random_params,
)
from tests.tolerances import assert_close


def loss(config: LlamaConfig, params: Any, gates: Gates | None = None) -> jax.Array:
    return bind(abstract(config)[0], numbered(params)).loss(*batch(config), gates=gates)[0]


def ones(config: LlamaConfig) -> Gates:
    heads = (config.n_layers, config.n_kv_heads, config.query_heads)
    return Gates(jnp.ones(heads), jnp.ones((config.n_layers, config.d_ff)))


@pytest.mark.parametrize("name", ["gqa", "bias"])
def test_a_gate_is_a_factor_on_what_the_neuron_writes(name: str) -> None:
    config, rng = CONFIGS[name], np.random.default_rng(1)
    params = random_params(config)
    gates = jax.tree.map(lambda one: jnp.asarray(rng.normal(size=one.shape)), ones(config))
    scaled = params | {
        "layers/attention/output": params["layers/attention/output"] * gates.heads[..., None, None],
        "layers/mlp/down": params["layers/mlp/down"] * gates.channels[..., None],
    }
    assert_close(loss(config, params, gates), loss(config, scaled), "float32", "forward")
    assert_close(loss(config, params, ones(config)), loss(config, params), "float32", "exact")


@pytest.mark.parametrize("name", ["gqa", "bias"])
def test_a_probe_of_gradients_is_weight_times_gradient(name: str) -> None:
    """The gradient of a gate is what the weights that the neuron writes with have to tell too."""
    config = CONFIGS[name]
    params = {path: jnp.asarray(value) for path, value in random_params(config).items()}
    gradient = jax.grad(lambda p: loss(config, p))(params)
    nothing = jax.tree.map(jnp.zeros_like, ones(config))
    settings = ProbeSettings(("gradients",), decay=0.5, tokens=batch(config).tokens.size)
    probe = make_probe(abstract(config)[0], settings)
    before = Statistics(jnp.asarray(4.0), gradients=nothing)
    stats = probe(params, before, batch(config), jnp.asarray(0))
    assert stats.count == 2 + 19  # tokens that are no padding, and half of those before
    told = {path: params[path] * gradient[path] for path in params}
    heads = told["layers/attention/output"].sum((-2, -1))
    assert_close(stats.gradients.heads, heads, "float32", "backward")
    channels = told["layers/mlp/down"].sum(-1)
    assert_close(stats.gradients.channels, channels, "float32", "backward")


@pytest.mark.parametrize("execution", ["gather", "mask"])
@pytest.mark.parametrize("unit", ["kv_group", "query_head"])
def test_omitted_neurons_are_gates_of_zero(unit: Any, execution: str) -> None:
    config = CONFIGS["bias"]
    params = random_params(config)
    rest: dict[str, Any] = {"attention_unit": unit, "dense_layers": (0,)}
    plan = make_plan(neurons(config), 0.5, 0.25, **rest)
    masks = random_masks(config, plan)
    heads, channels = (np.asarray(kept) for kept in masks[1])
    gates = jax.tree.map(np.array, ones(config))
    gates.heads[1:], gates.channels[1:] = 0, 0
    layer = np.arange(1, 3)[:, None]
    if unit == "kv_group":
        gates.heads[layer, heads] = 1
    else:
        gates.heads[layer[..., None], np.arange(4)[None, :, None], heads] = 1
    gates.channels[layer, channels] = 1

    masked = execution == "mask"
    small, _ = compact(params, nothing_omitted(plan) if masked else masks, plan)
    graph, _ = abstract(config, plan.segments, masked=masked)
    sparse = bind(graph, small | (mask_values(masks) if masked else {}))
    assert_close(sparse.loss(*batch(config))[0], loss(config, params, gates), "float32", "forward")
