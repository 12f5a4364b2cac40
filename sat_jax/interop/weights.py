"""Weights as the rest of the house sees them, and the one table that says where formats keep them.

A parameter's path is its place in the model (`layers/attention/query`), its value float32 with the
layers stacked in front. Formats keep one tensor a layer; `TABLE` gives its name in each format and
how it turns into ours.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Literal

import jax
import numpy as np
from flax import nnx

from sat_jax.errors import UserError
from sat_jax.models.llama import Llama, LlamaConfig


@dataclasses.dataclass(frozen=True)
class Weights:
    """A model at rest: `read(path)` fetches one parameter, float32, when it is asked for."""

    config: LlamaConfig
    read: Callable[[str], np.ndarray]

    @property
    def paths(self) -> tuple[str, ...]:
        return tuple(parameter_shapes(self.config))


@functools.lru_cache(maxsize=32)
def parameter_shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """Path → shape of every parameter of a dense model, in the order of the model."""
    model = nnx.eval_shape(lambda: Llama(config, rngs=nnx.Rngs(0)))
    return {path: variable.shape for path, variable in parameters(model).items()}


def parameters(model: Llama) -> dict[str, nnx.Variable[jax.Array]]:
    """Path → parameter of a dense model (one segment)."""
    flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
    return {"/".join(str(part) for part in key if part != 0): value for key, value in flat}


# How a stored tensor becomes ours. `rows`: [out, in], out split into our leading axes.
# `columns`: [out, in] with out = D, so transposed first: our matrices all end in D.
# `vector`: one axis, split or kept.
Layout = Literal["rows", "columns", "vector"]


@dataclasses.dataclass(frozen=True)
class Row:
    """One parameter of the table. `{layer}` in a name stands for the layer's number."""

    path: str
    huggingface: str
    gguf: str
    layout: Layout

    @property
    def stacked(self) -> bool:
        return self.path.startswith("layers/")

    def stored_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of one stored tensor, from the shape of our parameter."""
        own = shape[1:] if self.stacked else shape
        if self.layout == "vector":
            return (int(np.prod(own)),)
        out, width = int(np.prod(own[:-1])), own[-1]
        return (out, width) if self.layout == "rows" else (width, out)

    def ours(self, stored: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """A stored tensor as one layer of our parameter of shape `shape`."""
        own = shape[1:] if self.stacked else shape
        return (stored.T if self.layout == "columns" else stored).reshape(own)

    def stored(self, ours: np.ndarray) -> np.ndarray:
        """One layer of our parameter as the stored tensor: the inverse of `ours`."""
        if self.layout == "vector":
            return ours.reshape(-1)
        matrix = ours.reshape(-1, ours.shape[-1])
        return matrix.T if self.layout == "columns" else matrix


_HF, _ATTENTION, _MLP = "model.layers.{layer}", "layers/attention", "layers/mlp"
_HF_ATTENTION, _HF_MLP = f"{_HF}.self_attn", f"{_HF}.mlp"
_BLOCK = "blk.{layer}"

TABLE: dict[str, Row] = {
    row.path: row
    for row in (
        Row("embed", "model.embed_tokens.weight", "token_embd.weight", "rows"),
        Row("final_norm", "model.norm.weight", "output_norm.weight", "vector"),
        Row("lm_head", "lm_head.weight", "output.weight", "rows"),
        Row(
            "layers/attention_norm",
            f"{_HF}.input_layernorm.weight",
            f"{_BLOCK}.attn_norm.weight",
            "vector",
        ),
        Row(
            "layers/mlp_norm",
            f"{_HF}.post_attention_layernorm.weight",
            f"{_BLOCK}.ffn_norm.weight",
            "vector",
        ),
        *(
            Row(
                f"{_ATTENTION}/{name}",
                f"{_HF_ATTENTION}.{name[0]}_proj.weight",
                f"{_BLOCK}.attn_{gguf}.weight",
                layout,
            )
            for name, gguf, layout in (
                ("query", "q", "rows"),
                ("key", "k", "rows"),
                ("value", "v", "rows"),
                ("output", "output", "columns"),
            )
        ),
        *(
            Row(
                f"{_ATTENTION}/{name}_bias",
                f"{_HF_ATTENTION}.{name[0]}_proj.bias",
                f"{_BLOCK}.attn_{name[0]}.bias",
                "vector",
            )
            for name in ("query", "key", "value")
        ),
        *(
            Row(
                f"{_ATTENTION}/{name}_norm",
                f"{_HF_ATTENTION}.{name[0]}_norm.weight",
                f"{_BLOCK}.attn_{name[0]}_norm.weight",
                "vector",
            )
            for name in ("query", "key")
        ),
        Row(f"{_MLP}/gate", f"{_HF_MLP}.gate_proj.weight", f"{_BLOCK}.ffn_gate.weight", "rows"),
        Row(f"{_MLP}/up", f"{_HF_MLP}.up_proj.weight", f"{_BLOCK}.ffn_up.weight", "rows"),
        Row(f"{_MLP}/down", f"{_HF_MLP}.down_proj.weight", f"{_BLOCK}.ffn_down.weight", "columns"),
    )
}

Format = Literal["huggingface", "gguf"]


def stored_tensors(
    config: LlamaConfig, form: Format
) -> Iterator[tuple[str, Row, int | None, tuple[int, ...]]]:
    """(name, row, layer or None, shape) of every tensor that `config` has in a format."""
    for path, shape in parameter_shapes(config).items():
        row = TABLE[path]
        template, stored = getattr(row, form), row.stored_shape(shape)
        if row.stacked:
            for layer in range(config.n_layers):
                yield template.format(layer=layer), row, layer, stored
        else:
            yield template, row, None, stored


def check_tensors(
    expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]], where: object
) -> None:
    """Refuses, by name, tensors that are missing, left over or of another shape."""
    problems = [f"{name} is missing" for name in expected if name not in found]
    problems += [f"{name} is not a parameter of this model" for name in found if name not in expected]
    problems += [
        f"{name} has shape {list(found[name])}, expected {list(shape)}"
        for name, shape in expected.items()
        if name in found and tuple(found[name]) != tuple(shape)
    ]
    if problems:
        rest = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise UserError(f"{where}: tensors do not fit config: {'; '.join(problems[:3])}{rest}")


def stacked_reader(
    config: LlamaConfig, form: Format, fetch: Callable[[str], np.ndarray]
) -> Callable[[str], np.ndarray]:
    """`read(path)` from `fetch(name)`, which gives one stored tensor; one parameter at a time."""
    shapes = parameter_shapes(config)

    def read(path: str) -> np.ndarray:
        row, shape = TABLE[path], shapes[path]
        out = np.empty(shape, np.float32)
        template = getattr(row, form)
        if not row.stacked:
            out[...] = row.ours(fetch(template), shape)
            return out
        for layer in range(config.n_layers):
            out[layer] = row.ours(fetch(template.format(layer=layer)), shape)
        return out

    return read
