"""Declarations of file formats by model families: tensors, config.json and GGUF metadata.

A family declares a `ModelFormat` for each Hugging Face model type, and `sat_jax.interop` reads and
writes files by these declarations.

Parameters have paths in the model (`layers/attention/query`). Their values are float32. Those below
`layers/` have all layers stacked on the first axis; files have one tensor per layer.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from sat_jax.models.decoder_config import DecoderConfig
from sat_jax.models.format_fields import GgufFields, Json, JsonFields
from sat_jax.nn.decoder import Decoder

Format = Literal["huggingface", "gguf"]
Layout = Literal["rows", "columns", "vector"]
Shape = tuple[int, ...]

# Parts of tensor names that torch.compile, DDP, FSDP and activation checkpointing add.
_WRAPPERS = re.compile(
    r"(^|\.)(?:(?:_orig_mod|module|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.)+"
)


@dataclasses.dataclass(frozen=True)
class Stored:
    """Name and layout of a tensor in one format. `{layer}` in the name is the layer's number; a
    name without it is of one tensor, which all layers share.

    `rows` is `[out, in]`: all axes of a parameter but the last are flattened into `out`. `columns`
    is the transpose of `rows`. `vector` has one axis: all axes of a parameter flattened.

    A tensor that holds several parameters concatenates them along `out`. With `by_head` it
    concatenates them within each entry of the parameters' first axis: head by head.
    With `rotary_pairs` the dimensions of a head (axis -2) are stored in the order
    0, E/2, 1, E/2 + 1, ..., as rotation of adjacent dimensions needs them.
    """

    name: str
    layout: Layout
    by_head: bool = False
    rotary_pairs: bool = False

    def shape(self, shapes: Sequence[Shape]) -> Shape:
        """Return the stored shape of parameters that have `shapes` in one layer."""
        tail = self._tail(shapes[0])
        out = sum(math.prod(shape) for shape in shapes) // math.prod(tail)
        return (*tail, out) if self.layout == "columns" else (out, *tail)

    def join(self, parameters: Sequence[np.ndarray]) -> np.ndarray:
        """Return the stored tensor of one layer from its parameters."""
        tail = self._tail(parameters[0].shape)
        lead = len(parameters[0]) if self.by_head else 1
        if self.rotary_pairs:
            parameters = [_exchange(p, (2, -1)) for p in parameters]
        parts = [parameter.reshape(lead, -1, *tail) for parameter in parameters]
        joined = np.concatenate(parts, axis=1).reshape(-1, *tail)
        return joined.T if self.layout == "columns" else joined

    def split(self, stored: np.ndarray, shapes: Sequence[Shape]) -> list[np.ndarray]:
        """Return the parameters of one layer, which have `shapes`: the inverse of `join`."""
        tail = self._tail(shapes[0])
        lead = shapes[0][0] if self.by_head else 1
        rows = stored.T if self.layout == "columns" else stored
        sizes = [math.prod(shape) // math.prod(tail) // lead for shape in shapes]
        parts = np.split(rows.reshape(lead, -1, *tail), np.cumsum(sizes)[:-1], axis=1)
        parameters = [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]
        if self.rotary_pairs:
            parameters = [_exchange(p, (-1, 2)) for p in parameters]
        return parameters

    def _tail(self, shape: Shape) -> Shape:
        return () if self.layout == "vector" else shape[-1:]


def _exchange(parameter: np.ndarray, factors: tuple[int, int]) -> np.ndarray:
    """Split axis -2 into `factors`, exchange the two and flatten them again."""
    *lead, size, width = parameter.shape
    return parameter.reshape(*lead, *factors, width).swapaxes(-3, -2).reshape(*lead, size, width)


@dataclasses.dataclass(frozen=True)
class Tensor:
    """The parameters of a stored tensor, and its name and layout in each format.

    `gguf` is None if GGUF has no such tensor. A model without these parameters has no such tensor.
    """

    paths: tuple[str, ...]
    huggingface: Stored
    gguf: Stored | None

    @property
    def stacked(self) -> bool:
        """Whether files have one tensor per layer."""
        return self.paths[0].startswith("layers/")

    def stored(self, form: Format) -> Stored:
        """Return name and layout in a format that has the tensor."""
        stored: Stored | None = getattr(self, form)
        if stored is None:
            raise ValueError(f"{form} has no tensor for {', '.join(self.paths)}")
        return stored


def layer_paths(names: str) -> tuple[str, ...]:
    """Return the paths of a layer's parameters, whose names are separated by spaces."""
    return tuple(f"layers/{name}" for name in names.split())


def tensor(path: str, huggingface: str, gguf: str, layout: Layout = "rows") -> Tensor:
    """Return the tensor of one parameter, which both formats store in the same layout."""
    return Tensor((path,), Stored(huggingface, layout), Stored(gguf, layout))


def weight_and_bias(
    weight: tuple[str, ...], bias: tuple[str, ...], huggingface: Stored, gguf: Stored
) -> tuple[Tensor, Tensor]:
    """Return the tensors `NAME.weight`, laid out as `Stored` says, and `NAME.bias`, a vector."""
    places = (huggingface, gguf)
    weights = [dataclasses.replace(place, name=f"{place.name}.weight") for place in places]
    biases = [
        dataclasses.replace(place, name=f"{place.name}.bias", layout="vector") for place in places
    ]
    return Tensor(weight, *weights), Tensor(bias, *biases)


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """A tensor of a file: name, declaration, layer and shape."""

    name: str
    tensor: Tensor
    layer: int | None
    shape: Shape


@dataclasses.dataclass(frozen=True)
class GgufFormat:
    """Declaration of a model type in GGUF.

    `keys` are the metadata keys, without the architecture's prefix, that `read_config` uses or that
    change nothing. `neutral` lists for other keys the values that change nothing; a key in neither
    is refused. `write_config(config)` returns the metadata that `read_config` reads. `ignored` are
    tensors that are not parameters, and `float32` matrices that llama.cpp always has in float32.
    """

    architecture: str
    keys: frozenset[str]
    neutral: Mapping[str, tuple[Any, ...]]
    read_config: Callable[[GgufFields], DecoderConfig]
    write_config: Callable[[Any], Json]
    ignored: frozenset[str] = frozenset()
    float32: frozenset[str] = frozenset()


class Files(NamedTuple):
    """Names of the files of a directory: that of the config, and the start of those of weights.

    `tied_head`: a tied embedding is also stored under the name of the head.
    """

    config: str
    weights: str
    tied_head: bool = False


HUGGINGFACE_FILES = Files("config.json", "model")


@dataclasses.dataclass(frozen=True)
class ModelFormat:
    """Declaration of a model type.

    `defaults` are the values of fields that a config.json lacks: those of the configuration class
    in transformers. `aliases` are second names of fields. `neutral` lists fields that would change
    the function, with the values that do not; any other value is refused. `write_config(config)`
    returns the fields of config.json that the model type adds to those common to all. `ignored` is
    a regular expression for the names of Hugging Face tensors that are not parameters. Names on
    disk may lack `optional_prefix`; written names have it. `files`: names other than those of
    Hugging Face; the config in such a file may lack `model_type`. Without `gguf`, GGUF files store
    the model as one of the model type `gguf_model_type`, if that is not None.
    """

    model_type: str
    architecture: str
    tensors: tuple[Tensor, ...]
    defaults: Mapping[str, Any]
    neutral: Mapping[str, tuple[Any, ...]]
    read_config: Callable[[JsonFields], DecoderConfig]
    write_config: Callable[[Any], Json]
    gguf: GgufFormat | None = None
    gguf_model_type: str | None = None
    ignored: str = r"(?!)"
    optional_prefix: str = ""
    aliases: Mapping[str, str] = dataclasses.field(default_factory=dict)
    files: Files = HUGGINGFACE_FILES

    def is_ignored(self, name: str) -> bool:
        """Return whether a Hugging Face tensor is not a parameter."""
        return re.fullmatch(self.ignored, name) is not None

    def full_name(self, name: str) -> str:
        """Return the declared name of a Hugging Face tensor, with the optional prefix.

        The names that PyTorch's wrappers of modules add (`_orig_mod.`, `module.`) are removed.
        """
        name = _WRAPPERS.sub(r"\1", name)
        full = self.optional_prefix + name
        templates = (re.escape(tensor.huggingface.name) for tensor in self.tensors)
        patterns = (template.replace(r"\{layer\}", r"\d+") for template in templates)
        return full if any(re.fullmatch(pattern, full) for pattern in patterns) else name

    def tensor_of(self, path: str) -> Tensor:
        """Return the declaration of the tensor that holds the parameter at `path`."""
        return next(declared for declared in self.tensors if path in declared.paths)

    def stored_tensors(
        self, shapes: Mapping[str, jax.ShapeDtypeStruct], form: Format
    ) -> Iterator[StoredTensor]:
        """Yield every tensor of a file with the parameters of `shapes`, in declared order."""
        declared = {path for tensor in self.tensors for path in tensor.paths}
        if missing := shapes.keys() - declared:
            raise ValueError(f"{self.model_type} declares no tensor for {sorted(missing)}")
        for tensor in self.tensors:
            if not shapes.keys() & set(tensor.paths):
                continue
            full = [shapes[path].shape for path in tensor.paths]
            one_layer = [shape[1:] for shape in full] if tensor.stacked else full
            stored = tensor.stored(form)
            for layer in range(full[0][0]) if tensor.stacked else [None]:
                name = stored.name.format(layer=layer)
                yield StoredTensor(name, tensor, layer, stored.shape(one_layer))


@dataclasses.dataclass(frozen=True)
class Family:
    """A model family: the class of its models, and its file formats by model type."""

    model: Callable[..., Decoder]
    formats: tuple[ModelFormat, ...]
