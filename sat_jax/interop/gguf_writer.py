"""GGUF files out: weights, quantized or not, with the metadata and the types of llama.cpp."""

import dataclasses
import math
import uuid
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
from gguf import GGML_QUANT_SIZES, GGUFWriter
from gguf import GGMLQuantizationType as Quant
from gguf.quants import quant_shape_to_byte_shape, quantize

from sat_jax.errors import UserError
from sat_jax.interop.gguf import QUANTIZATION_VERSION
from sat_jax.interop.weights import Weights, joined_tensors
from sat_jax.models import registry
from sat_jax.models.build import shapes
from sat_jax.models.decoder_config import DecoderConfig
from sat_jax.models.format_fields import GgufFields, Json
from sat_jax.models.formats import GgufFormat, Shape, StoredTensor
from sat_jax.models.rope_formats import ROPE_FREQS, rope_divisors, same_in_gguf
from sat_jax.nn.rope import RopeConfig

TensorType = Literal["F32", "F16", "Q8_0", "Q4_0", "Q4_1"]
TENSOR_TYPES: tuple[TensorType, ...] = get_args(TensorType)
_FLOATS = ("F32", "F16")
_FILE_TYPES: dict[TensorType, int] = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7}
# Values to which all types but F32 extend: weights, or scales of blocks, in float16.
_LIMIT = float(np.finfo(np.float16).max)


class _Spec(NamedTuple):
    """Type and shape, in values, of a tensor of a file."""

    kind: Quant
    shape: Shape


class _Plan(NamedTuple):
    """A file before any weight is read: `extra` are the tensors that are no parameters, by name,
    `stored` the others, and `specs` describes all of them in the order of the file."""

    config: DecoderConfig
    declared: GgufFormat
    extra: Mapping[str, np.ndarray]
    stored: Sequence[StoredTensor]
    specs: Mapping[str, _Spec]


def write_file(
    path: Path,
    weights: Weights,
    tensor_type: TensorType,
    tokenizer: Mapping[str, Any] | None = None,
) -> Counter[str]:
    """Write a model as one GGUF file, and return the number of tensors of each type.

    Matrices have `tensor_type`, with the exceptions of llama.cpp: see `_kind_of`. `tokenizer` has
    the keys `tokenizer.*` of the file (`sat_jax.data.gguf_tokenizer.to_gguf`); without them it has
    no tokenizer. If the function fails, no file is left behind. Raises `UserError` if the file
    exists, if GGUF cannot express the model or a weight, and for weights that are quantized
    already, unless `tensor_type` is F32 or F16.
    """
    if tensor_type not in TENSOR_TYPES:
        raise UserError(f"tensor type {tensor_type!r}; accepted: {', '.join(TENSOR_TYPES)}")
    if weights.quantized and tensor_type not in _FLOATS:
        raise UserError(
            f"weights that are quantized already ({', '.join(weights.quantized)}) cannot be"
            f" quantized to {tensor_type}; accepted: {' and '.join(_FLOATS)}"
        )
    if path.suffix != ".gguf":
        raise UserError(f"{path}: accepted: the name of a file that ends in .gguf")
    _check_new(path)
    plan = _plan(weights.config, tensor_type)
    keys = plan.declared.write_config(plan.config)
    _check_expressible(plan, keys)
    metadata = {
        **_general(path.stem, tensor_type),
        **{f"{plan.declared.architecture}.{key}": value for key, value in keys.items()},
        **_tokens(plan.config, tokenizer or {"tokenizer.ggml.model": "none"}),
    }
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _write(partial, plan, metadata, weights)
        _check_new(path)
        partial.rename(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error}") from error
    finally:
        partial.unlink(missing_ok=True)
    return Counter(spec.kind.name for spec in plan.specs.values())


def _check_new(path: Path) -> None:
    if path.exists():
        raise UserError(f"{path}: exists already; accepted: a new file")


def _gguf_model(config: DecoderConfig) -> tuple[DecoderConfig, GgufFormat]:
    """Return the config as one of a model type that GGUF has, and the format of that type."""
    model_type = registry.format_of(config).gguf_model_type or config.family
    declared = registry.MODEL_TYPES[model_type].gguf
    if declared is None:
        accepted = [
            name for name, form in registry.MODEL_TYPES.items() if form.gguf or form.gguf_model_type
        ]
        raise UserError(
            f"a model of type {model_type!r} cannot be written as a GGUF file; accepted:"
            f" {', '.join(accepted)}"
        )
    return dataclasses.replace(config, family=model_type), declared


def _plan(config: DecoderConfig, tensor_type: TensorType) -> _Plan:
    config, declared = _gguf_model(config)
    extra = {}
    if config.rope is not None and ROPE_FREQS in declared.ignored:
        divisors = rope_divisors(config.rope, config.rotary_dim)
        extra = {} if divisors is None else {ROPE_FREQS: divisors}
    stored = list(registry.format_of(config).stored_tensors(shapes(config), "gguf"))
    specs = {name: _Spec(Quant.F32, tensor.shape) for name, tensor in extra.items()}
    for tensor in stored:
        kind = _kind_of(tensor, tensor_type, config, declared)
        specs[tensor.name] = _Spec(kind, tensor.shape)
    return _Plan(config, declared, extra, stored, specs)


def _kind_of(
    tensor: StoredTensor, tensor_type: TensorType, config: DecoderConfig, declared: GgufFormat
) -> Quant:
    """Return the type of a tensor, as llama.cpp chooses it.

    Vectors and tables of positions are F32. In a file of 4-bit types the output head (a tied
    embedding is one) is Q8_0, llama.cpp's choice where rows are no multiple of 256; for others it
    takes Q6_K, which the package gguf does not write. A matrix whose rows are no multiple of a
    block is F16.
    """
    if len(tensor.shape) == 1 or tensor.name in declared.float32:
        return Quant.F32
    is_head = tensor.tensor.paths == ("embed" if config.tie_embeddings else "lm_head",)
    kind = Quant.Q8_0 if is_head and tensor_type not in _FLOATS else Quant[tensor_type]
    return kind if tensor.shape[-1] % GGML_QUANT_SIZES[kind][0] == 0 else Quant.F16


def _check_expressible(plan: _Plan, keys: Json) -> None:
    """Raise `UserError` that names a field of the config that would be read otherwise."""
    config, declared = plan.config, plan.declared
    fields = GgufFields(
        declared.architecture,
        keys,
        bos_token_id=config.bos_token_id,
        eos_token_ids=config.eos_token_ids,
        shapes={name: spec.shape for name, spec in plan.specs.items()},
        fetch=plan.extra.__getitem__,
        where="written as GGUF",
    )
    fields.check_neutral(declared.keys, declared.neutral)
    read = declared.read_config(fields)
    for field in dataclasses.fields(config):
        value, other = getattr(config, field.name), getattr(read, field.name)
        if not _is_same(value, other, config.rotary_dim):
            raise UserError(
                f"GGUF files of architecture {declared.architecture!r} cannot express"
                f" {field.name} = {value!r}; accepted: {other!r}"
            )


def _is_same(value: Any, other: Any, rotary_dim: int) -> bool:
    """Return whether a value of a config is the one that a file, with its float32, gives."""
    if isinstance(value, RopeConfig):
        return same_in_gguf(value, other, rotary_dim)
    if isinstance(value, float):
        return math.isclose(value, other, rel_tol=1e-6)
    return bool(value == other)


def _general(name: str, tensor_type: TensorType) -> Json:
    return {
        "general.type": "model",
        "general.name": name,
        "general.file_type": _FILE_TYPES[tensor_type],
        "general.quantization_version": QUANTIZATION_VERSION,
    }


def _tokens(config: DecoderConfig, tokenizer: Mapping[str, Any]) -> Json:
    """Return the keys `tokenizer.*`; special ids that the tokenizer lacks are those of the config.

    GGUF has two ids that end a text, eos and eot. llama.cpp recognizes others by their names.
    """
    ends = config.eos_token_ids
    eos = tokenizer.get("tokenizer.ggml.eos_token_id", next(iter(ends), None))
    eot = next((token for token in ends if token != eos), None)
    ids = {"bos": config.bos_token_id, "eos": eos, "eot": eot}
    known = {f"tokenizer.ggml.{k}_token_id": token for k, token in ids.items() if token is not None}
    return known | dict(tokenizer)


def _quantized(tensor: np.ndarray, kind: Quant, name: str) -> np.ndarray:
    """Return the stored values of a tensor. Raises `UserError` for one that float16 lacks."""
    if kind != Quant.F32:
        largest = float(np.abs(tensor).max())
        if not largest <= _LIMIT:
            raise UserError(
                f"tensor {name} has a value of magnitude {largest:g}, which {kind.name} cannot"
                f" represent; accepted: up to {_LIMIT:g}, or F32"
            )
    # A block of values near 0 has the scale 0 in float16, whatever its inverse is.
    with np.errstate(over="ignore", invalid="ignore"):
        return quantize(tensor, kind)


def _write(path: Path, plan: _Plan, metadata: Json, weights: Weights) -> None:
    """Write metadata, then one tensor after the other."""
    writer = GGUFWriter(path, plan.declared.architecture)
    for key, value in metadata.items():
        match value:
            case bool():
                writer.add_bool(key, value)
            case int():
                writer.add_uint32(key, value)
            case float():
                writer.add_float32(key, value)
            case str():
                writer.add_string(key, value)
            case _:
                writer.add_array(key, value)
    for name, (kind, shape) in plan.specs.items():
        size = math.prod(quant_shape_to_byte_shape(shape, kind))
        writer.add_tensor_info(name, shape, np.dtype(np.float32), size, kind)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for extra in plan.extra.values():
            writer.write_tensor_data(extra)
        for stored, tensor in joined_tensors(plan.config, plan.stored, "gguf", weights.read):
            kind = plan.specs[stored.name].kind
            writer.write_tensor_data(_quantized(tensor, kind, stored.name))
    finally:
        writer.close()
