"""Models from configs: layouts, initial values, and models with given values."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax import nnx

from sat_jax.models.llama import Llama
from sat_jax.nn.decoder import Compute, Decoder
from sat_jax.nn.layout import Flat, Layout, flat_values, make_layout


@functools.lru_cache(maxsize=64)
def layout_of(config: Any, compute: Compute = Compute()) -> Layout[Decoder]:
    """Return the layout of the model that a config describes; no values are made."""
    return make_layout(nnx.eval_shape(lambda: Llama(config, compute, rngs=nnx.Rngs(0))))


def initial_values(config: Any, seed: int) -> Flat:
    """Return random values by path; a pure function of `seed`, to be run under jit."""
    return flat_values(Llama(config, rngs=nnx.Rngs(seed)))


def build(
    config: Any, read: Callable[[str], np.ndarray], compute: Compute = Compute()
) -> Decoder:
    """Return the model whose array at each path is `read(path)`."""
    layout = layout_of(config, compute)
    return layout.bind({path: jax.numpy.asarray(read(path)) for path in layout.leaves})
