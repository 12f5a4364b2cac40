"""GGUF files in: metadata → a model's configuration, quantized tensors → float32."""

from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader, ReaderTensor
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


def open_reader(path: Path) -> GGUFReader:
    """Return a file's keys and tensors, memory-mapped. Raises `UserError` if it is unreadable."""
    try:
        return GGUFReader(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, IndexError, KeyError, OverflowError) as error:
        # The library's own words for a file that ends early are about arrays.
        why = f"truncated, damaged or of another kind: {error}"
        why = LFS_POINTER if is_lfs_pointer(path) else why
        raise UserError(f"{path}: cannot be read as GGUF: {why}") from error


def open_file(path: Path) -> Weights:
    """Return the model in a GGUF file, memory-mapped; a tensor is dequantized when it is read."""
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    reader = open_reader(path)
    declared = _declaration(reader, path)
    tensors = {tensor.name: tensor for tensor in reader.tensors}

    def fetch(name: str) -> np.ndarray:
        return _dequantized(tensors[name], path)

    shapes = {name: tuple(int(n) for n in reversed(t.shape)) for name, t in tensors.items()}
    prefix = f"{declared.architecture}."
    bos, eos = (_value(reader, f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos"))
    fields = GgufFields(
        declared.architecture,
        {k.removeprefix(prefix): _value(reader, k) for k in reader.fields if k.startswith(prefix)},
        bos_token_id=None if bos is None else int(bos),
        eos_token_ids=() if eos is None else (int(eos),),
        shapes=shapes,
        fetch=fetch,
        where=str(path),
    )
    fields.check_neutral(declared.keys, declared.neutral)
    config = declared.read_config(fields)
    parameters = {name: shape for name, shape in shapes.items() if name not in declared.ignored}
    check_tensors(config, "gguf", parameters, path)
    return Weights(config, stacked_reader(config, "gguf", fetch))


def _declaration(reader: GGUFReader, path: Path) -> GgufFormat:
    architecture = str(_value(reader, "general.architecture"))
    declared = registry.GGUF_ARCHITECTURES.get(architecture)
    if declared is None or declared.gguf is None:
        raise UserError(
            f"{path}: architecture {architecture!r} is not supported; "
            f"accepted: {', '.join(registry.GGUF_ARCHITECTURES)}"
        )
    if _value(reader, "split.count", 1) > 1:
        raise UserError(f"{path}: one part of a split model; merge the parts into one file")
    return declared.gguf


def _value(reader: GGUFReader, key: str, default: Any = None) -> Any:
    field = reader.fields.get(key)
    return default if field is None else field.contents()


def _dequantized(tensor: ReaderTensor, path: Path) -> np.ndarray:
    try:
        return dequantize(tensor.data, tensor.tensor_type)
    except (NotImplementedError, ValueError) as error:
        raise UserError(f"{path}: tensor {tensor.name} cannot be dequantized: {error}") from error
