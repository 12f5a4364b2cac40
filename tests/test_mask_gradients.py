"""Masks as factors on units, and their gradient, which the metric `taylor` uses."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sat_jax.models.build import layout_of
from sat_jax.models.llama import LlamaConfig
from sat_jax.nn.loss import next_token_loss
from sat_jax.sparsity.statistics import Statistics
from sat_jax.train.probe import ProbeSettings, make_probe
from tests.conftest import slow_after
from tests.small_models import CONFIGS, batch, random_params
from tests.tolerances import assert_close

Masks = dict[str, jax.Array]


@functools.partial(jax.jit, static_argnums=0)
def loss(config: LlamaConfig, params: Any, masks: Masks | None = None) -> jax.Array:
    return next_token_loss(layout_of(config).bind(params, masks or {}), *batch(config))[0]


def ones(config: LlamaConfig) -> Masks:
    heads = (config.n_layers, config.n_kv_heads, config.query_heads)
    return {"query_head": jnp.ones(heads), "channel": jnp.ones((config.n_layers, config.d_ff))}


@pytest.mark.parametrize("name", slow_after(1, "bias", "gqa"))
def test_a_mask_scales_what_a_unit_adds_to_the_residual_stream(name: str) -> None:
    config, rng = CONFIGS[name], np.random.default_rng(1)
    params = random_params(config)
    masks = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), ones(config))
    heads, channels = masks["query_head"], masks["channel"]
    scaled = params | {
        "layers/attention/output": params["layers/attention/output"] * heads[..., None, None],
        "layers/mlp/down": params["layers/mlp/down"] * channels[..., None],
    }
    assert_close(loss(config, params, masks), loss(config, scaled), "float32", "forward")
    assert_close(loss(config, params, ones(config)), loss(config, params), "float32", "exact")
    # The mask of a group is that of each of its heads.
    groups = {"kv_group": heads[..., 0]}
    each = {"query_head": jnp.broadcast_to(heads[..., :1], heads.shape)}
    assert_close(loss(config, params, groups), loss(config, params, each), "float32", "forward")


@pytest.mark.parametrize("name", slow_after(1, "bias", "gqa"))
def test_the_gradient_of_a_mask_is_weight_times_gradient(name: str) -> None:
    """A probe of gradients equals Σ W · ∂L/∂W over the output rows of a unit."""
    config = CONFIGS[name]
    params = jax.device_put(random_params(config))
    gradient = jax.grad(lambda p: loss(config, p))(params)
    zeros = jax.tree.map(jnp.zeros_like, ones(config))
    settings = ProbeSettings(("gradients",), decay=0.5, tokens=batch(config).tokens.size)
    probe = jax.jit(make_probe(layout_of(config), settings))
    before = Statistics(jnp.asarray(4.0), gradients=zeros)
    stats = probe(params, before, batch(config))
    assert stats.count == 2 + 19  # the tokens that are no padding, and half of those before
    products = {path: params[path] * gradient[path] for path in params}
    heads = products["layers/attention/output"].sum((-2, -1))
    assert_close(stats.gradients["query_head"], heads, "float32", "backward")
    channels = products["layers/mlp/down"].sum(-1)
    assert_close(stats.gradients["channel"], channels, "float32", "backward")
