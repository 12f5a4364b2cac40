"""Parameters as flat dictionaries, `path → array`: the form that all but the modules use.

A whole model stacks all its layers: `layers/attention/query` is `[L, K, G, E, D]`. A model in
segments numbers them: `layers/0/attention/query` holds the layers of segment 0. `embed`,
`final_norm` and `lm_head` are the same in both.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict

from sat_jax.models.live import Live
from sat_jax.models.llama import Compute, Llama
from sat_jax.models.llama_config import LlamaConfig
from sat_jax.sparsity.plan import Segment

Flat = dict[str, Any]


@functools.lru_cache(maxsize=64)
def abstract(
    config: LlamaConfig,
    segments: tuple[Segment, ...] | None = None,
    compute: Compute = Compute(),
    masked: bool = False,
    live: Live | None = None,
) -> tuple[nnx.GraphDef[Llama], Flat]:
    """The model without its values: graph definition, and shapes by path (segments numbered)."""
    model = nnx.eval_shape(
        lambda: Llama(config, segments, compute, masked=masked, live=live, rngs=nnx.Rngs(0))
    )
    graph, state = nnx.split(model)
    return graph, _flatten(state)


def bind(graph: nnx.GraphDef[Llama], values: Mapping[str, Any]) -> Llama:
    """The model with `values` (segments numbered; masks among them where the model has masks)."""
    keyed = {
        tuple(int(k) if k.isdigit() else k for k in p.split("/")): v for p, v in values.items()
    }
    model: Llama = nnx.merge(graph, unflatten_dict(keyed))
    return model


def whole(values: Mapping[str, Any]) -> Flat:
    """Paths of a model in one segment, renamed to those of a whole model."""
    return {path.replace("layers/0/", "layers/"): value for path, value in values.items()}


def numbered(values: Mapping[str, Any]) -> Flat:
    """Paths of a whole model, renamed to those of a model in one segment."""
    return {
        f"layers/0/{path.removeprefix('layers/')}" if path.startswith("layers/") else path: value
        for path, value in values.items()
    }


def shapes(config: LlamaConfig) -> dict[str, jax.ShapeDtypeStruct]:
    """Path → shape and dtype of every parameter of the whole model."""
    return whole(abstract(config)[1])


def initial(config: LlamaConfig, seed: int) -> Flat:
    """Random parameters of a whole model; a pure function of `seed`, to be run under jit."""
    return whole(_flatten(nnx.split(Llama(config, rngs=nnx.Rngs(seed)))[1]))


def flat_params(model: Llama) -> Flat:
    """The parameters of a whole model by path."""
    if len(model.layers) != 1:
        raise ValueError("a model in several segments has no whole parameters; expand it first")
    return whole(_flatten(nnx.state(model, nnx.Param)))


def build(
    config: LlamaConfig, read: Callable[[str], np.ndarray], compute: Compute = Compute()
) -> Llama:
    """A whole model whose parameter at each path is `read(path)`."""
    graph, _ = abstract(config, compute=compute)
    values = {path: jax.numpy.asarray(read(path)) for path in shapes(config)}
    return bind(graph, numbered(values))


def _flatten(state: Any) -> Flat:
    paths = flatten_dict(nnx.to_pure_dict(state))
    return {"/".join(map(str, path)): value for path, value in paths.items()}
