"""Build models from configs: layouts, random initial values, and models with given values."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from sat_jax.models.decoder_config import DecoderConfig
from sat_jax.models.registry import FAMILIES
from sat_jax.nn.decoder import Compute, Decoder
from sat_jax.nn.layout import Flat, Layout, flat_values, make_layout


@functools.lru_cache(maxsize=64)
def layout_of(config: DecoderConfig, compute: Compute = Compute()) -> Layout[Decoder]:
    """Return the layout of the model that a config describes; no array is allocated."""
    model = FAMILIES[config.family].model
    return make_layout(nnx.eval_shape(lambda: model(config, compute, rngs=nnx.Rngs(0))))


def shapes(config: DecoderConfig) -> Mapping[str, jax.ShapeDtypeStruct]:
    """Return by path the shape and dtype of every parameter, layers stacked."""
    return layout_of(config).shapes


def initial_values(config: DecoderConfig, seed: int) -> Flat:
    """Return random values by path; a pure function of `seed`, to be run under jit."""
    return flat_values(FAMILIES[config.family].model(config, rngs=nnx.Rngs(seed)))


def build(
    config: DecoderConfig, read: Callable[[str], Any], compute: Compute = Compute()
) -> Decoder:
    """Return the model whose array or `Weight` at each path is `read(path)`."""
    layout = layout_of(config, compute)
    return layout.bind({path: jax.tree.map(jnp.asarray, read(path)) for path in layout.leaves})
