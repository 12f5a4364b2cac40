"""GGUF files in: metadata → a model's configuration, quantized tensors → float32."""

import dataclasses
import sys
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGUFReader, ReaderTensor
from gguf.quants import dequantize

from sat_jax.errors import UserError
from sat_jax.interop.weights import (
    LFS_POINTER,
    Weights,
    check_tensors,
    is_lfs_pointer,
    stacked_reader,
)
from sat_jax.models import registry
from sat_jax.models.format_fields import GgufFields
from sat_jax.models.formats import GgufFormat

# Other versions have other layouts of quantized blocks.
QUANTIZATION_VERSION = 2


@dataclasses.dataclass(frozen=True)
class GgufFile:
    """Metadata and tensors of a GGUF file, memory-mapped."""

    path: Path
    reader: GGUFReader

    def value(self, key: str, default: Any = None) -> Any:
        """Return the value of a metadata key, or `default` if the file has no such key."""
        field = self.reader.fields.get(key)
        try:
            return default if field is None else field.contents()
        except UnicodeDecodeError as error:
            raise UserError(f"{self.path}: {key} is not UTF-8: {error}") from error


def open_gguf(path: Path) -> GgufFile:
    """Open a file. Raises `UserError` if it is unreadable or of another byte order."""
    try:
        reader = GGUFReader(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, IndexError, KeyError, OverflowError) as error:
        # The library's own words for a file that ends early are about arrays.
        why = f"truncated, damaged or of another kind: {error}"
        why = LFS_POINTER if is_lfs_pointer(path) else why
        raise UserError(f"{path}: cannot be read as GGUF: {why}") from error
    # The library dequantizes in the byte order of this machine.
    if reader.byte_order == "S":
        order = reader.endianess.name.lower()
        raise UserError(
            f"{path}: a {order}-endian file; accepted: the byte order of this machine"
            f" ({sys.byteorder}-endian); gguf-convert-endian of the package gguf converts the file"
        )
    return GgufFile(path, reader)


def open_file(path: Path) -> Weights:
    """Return the model in a GGUF file, memory-mapped; a tensor is dequantized when it is read."""
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    file = open_gguf(path)
    declared = _declaration(file)
    tensors = {tensor.name: tensor for tensor in file.reader.tensors}

    def fetch(name: str) -> np.ndarray:
        return _dequantized(tensors[name], path)

    shapes = {name: tuple(int(n) for n in reversed(t.shape)) for name, t in tensors.items()}
    prefix = f"{declared.architecture}."
    bos, *ends = (file.value(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos", "eot"))
    keys = [key for key in file.reader.fields if key.startswith(prefix)]
    fields = GgufFields(
        declared.architecture,
        {key.removeprefix(prefix): file.value(key) for key in keys},
        bos_token_id=None if bos is None else int(bos),
        eos_token_ids=tuple(dict.fromkeys(int(end) for end in ends if end is not None)),
        shapes=shapes,
        fetch=fetch,
        where=str(path),
    )
    fields.check_neutral(declared.keys, declared.neutral)
    config = declared.read_config(fields)
    parameters = {name: shape for name, shape in shapes.items() if name not in declared.ignored}
    check_tensors(config, "gguf", parameters, path)
    # A type with a block of several values is quantized.
    types = {tensor.tensor_type for tensor in tensors.values()}
    quantized = tuple(sorted(kind.name for kind in types if GGML_QUANT_SIZES[kind][0] > 1))
    return Weights(config, stacked_reader(config, "gguf", fetch), quantized=quantized)


def _declaration(file: GgufFile) -> GgufFormat:
    kind = file.value("general.type", "model")
    if kind != "model":
        raise UserError(f"{file.path}: general.type {kind!r}; accepted: model")
    version = file.value("general.quantization_version", QUANTIZATION_VERSION)
    if version != QUANTIZATION_VERSION:
        raise UserError(
            f"{file.path}: general.quantization_version {version}; accepted: {QUANTIZATION_VERSION}"
        )
    architecture = str(file.value("general.architecture"))
    declared = registry.GGUF_ARCHITECTURES.get(architecture)
    if declared is None or declared.gguf is None:
        raise UserError(
            f"{file.path}: architecture {architecture!r} is not supported; "
            f"accepted: {', '.join(registry.GGUF_ARCHITECTURES)}"
        )
    if file.value("split.count", 1) > 1:
        raise UserError(f"{file.path}: one part of a split model; merge the parts into one file")
    return declared.gguf


def _dequantized(tensor: ReaderTensor, path: Path) -> np.ndarray:
    try:
        return dequantize(tensor.data, tensor.tensor_type)
    except (NotImplementedError, ValueError) as error:
        raise UserError(f"{path}: tensor {tensor.name} cannot be dequantized: {error}") from error
