"""Weights as the rest of the house sees them, and the one table that says where formats keep them.

A parameter's path is its place in the model (`layers/attention/query`), its value float32 with the
layers stacked in front. Formats keep one tensor a layer; `TABLE` gives its name in each format and
how it turns into ours.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Literal

import numpy as np

from sat_jax.errors import UserError
from sat_jax.models.llama_config import LlamaConfig
from sat_jax.models.build import layout_of


@dataclasses.dataclass(frozen=True)
class Weights:
    """A model at rest: `read(path)` fetches one parameter, float32, when it is asked for."""

    config: LlamaConfig
    read: Callable[[str], np.ndarray]

    @property
    def paths(self) -> tuple[str, ...]:
        return tuple(layout_of(self.config).shapes)


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


def _vector(path: str, huggingface: str, gguf: str) -> Row:
    return Row(f"layers/{path}", f"model.layers.{{layer}}.{huggingface}", _block(gguf), "vector")


def _matrix(path: str, huggingface: str, gguf: str, layout: Layout = "rows") -> Row:
    name = f"model.layers.{{layer}}.{huggingface}_proj.weight"
    return Row(f"layers/{path}", name, _block(f"{gguf}.weight"), layout)


def _block(name: str) -> str:
    return f"blk.{{layer}}.{name}"


_ROWS = (
    Row("embed", "model.embed_tokens.weight", "token_embd.weight", "rows"),
    Row("final_norm", "model.norm.weight", "output_norm.weight", "vector"),
    Row("lm_head", "lm_head.weight", "output.weight", "rows"),
    _vector("attention_norm", "input_layernorm.weight", "attn_norm.weight"),
    _vector("mlp_norm", "post_attention_layernorm.weight", "ffn_norm.weight"),
    _matrix("attention/query", "self_attn.q", "attn_q"),
    _matrix("attention/key", "self_attn.k", "attn_k"),
    _matrix("attention/value", "self_attn.v", "attn_v"),
    _matrix("attention/output", "self_attn.o", "attn_output", "columns"),
    _vector("attention/query_bias", "self_attn.q_proj.bias", "attn_q.bias"),
    _vector("attention/key_bias", "self_attn.k_proj.bias", "attn_k.bias"),
    _vector("attention/value_bias", "self_attn.v_proj.bias", "attn_v.bias"),
    _vector("attention/query_norm", "self_attn.q_norm.weight", "attn_q_norm.weight"),
    _vector("attention/key_norm", "self_attn.k_norm.weight", "attn_k_norm.weight"),
    _matrix("mlp/gate", "mlp.gate", "ffn_gate"),
    _matrix("mlp/up", "mlp.up", "ffn_up"),
    _matrix("mlp/down", "mlp.down", "ffn_down", "columns"),
)
TABLE: dict[str, Row] = {row.path: row for row in _ROWS}

Format = Literal["huggingface", "gguf"]


def stored_tensors(
    config: LlamaConfig, form: Format
) -> Iterator[tuple[str, Row, int | None, tuple[int, ...]]]:
    """(name, row, layer or None, shape) of every tensor that `config` has in a format."""
    for path, abstract in layout_of(config).shapes.items():
        row = TABLE[path]
        template, stored = getattr(row, form), row.stored_shape(abstract.shape)
        if row.stacked:
            for layer in range(config.n_layers):
                yield template.format(layer=layer), row, layer, stored
        else:
            yield template, row, None, stored


LFS_POINTER = "a Git LFS pointer, whose content was not downloaded"


def is_lfs_pointer(path: Path) -> bool:
    """Whether the file only says where Git LFS would get its content from."""
    head = b"version https://git-lfs"
    with path.open("rb") as file:
        return file.read(len(head)) == head


def check_tensors(
    config: LlamaConfig, form: Format, found: Mapping[str, tuple[int, ...]], where: object
) -> None:
    """Refuses, by name, tensors that are missing, left over or of another shape."""
    if config.n_layers > len(found):
        raise UserError(f"{where}: config has {config.n_layers} layers, for {len(found)} tensors")
    expected = {name: shape for name, _, _, shape in stored_tensors(config, form)}
    problems = [f"{name} is missing" for name in expected if name not in found]
    problems += [f"{name} is no parameter of this model" for name in found if name not in expected]
    problems += [
        f"{name} has shape {list(found[name])}, expected {list(shape)}"
        for name, shape in expected.items()
        if name in found and tuple(found[name]) != shape
    ]
    if problems:
        rest = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise UserError(f"{where}: tensors do not fit config: {'; '.join(problems[:3])}{rest}")


def stacked_reader(
    config: LlamaConfig, form: Format, fetch: Callable[[str], np.ndarray]
) -> Callable[[str], np.ndarray]:
    """`read(path)` from `fetch(name)`, which gives one stored tensor; one parameter at a time."""
    abstract = layout_of(config).shapes

    def read(path: str) -> np.ndarray:
        row, shape = TABLE[path], abstract[path].shape
        out = np.empty(shape, np.float32)
        template = getattr(row, form)
        if not row.stacked:
            out[...] = row.ours(fetch(template), shape)
            return out
        for layer in range(config.n_layers):
            out[layer] = row.ours(fetch(template.format(layer=layer)), shape)
        return out

    return read
