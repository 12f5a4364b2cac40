"""Directories of models whose matrices are quantized.

The file `quantized.safetensors` has the tensors of all layers, by the paths of the parameters:
`PATH/values`, `PATH/scale` and `PATH/input_scale` are the arrays of `nn.quantized.Quantized`. The
config has the settings in `quantization_config`. transformers does not find weights in such a
directory, and refuses it.
"""

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, get_args

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from sat_jax.errors import UserError
from sat_jax.interop import huggingface
from sat_jax.interop.huggingface import Dtype
from sat_jax.interop.huggingface_config import config_from_json, read_json
from sat_jax.interop.weights import Weights, cast
from sat_jax.models.build import layout_of, shapes
from sat_jax.models.decoder_config import DecoderConfig
from sat_jax.models.format_fields import Json, JsonFields
from sat_jax.nn.decoder import Decoder
from sat_jax.nn.layout import flat_values
from sat_jax.nn.quantized import Bits, Packing, Quantized

FILE = "quantized.safetensors"
_FIELD, _OWN = "quantization_config", "sat_jax"
_PARTS = ("values", "scale", "input_scale")
_FLOATS = ("F32", "F16", "BF16")
_Shapes = dict[str, tuple[tuple[int, ...], tuple[str, ...]]]  # shape and dtypes by name


def packing_to_json(packing: Packing) -> Json:
    """Return the field of a config that says how matrices are stored."""
    return {_FIELD: {"quant_method": _OWN, **packing._asdict()}}


def packing_from_json(raw: Json, where: str) -> tuple[Json, Packing | None]:
    """Return a config without this field, and how matrices are stored; None: as plain arrays.
    Raises `UserError` for the settings of another program."""
    field = raw.get(_FIELD)
    if field is None:
        return raw, None
    settings: Json = field if isinstance(field, dict) and field.get("quant_method") == _OWN else {}
    values: list[Any] = [settings.get(name) for name in ("bits", "group", "input_scale")]
    # Files of before NormalFloat have integers.
    bits, group, input_scale, normal_float = *values, settings.get("normal_float", False)
    types = tuple(map(type, (bits, group, input_scale, normal_float)))
    if types != (int, int, bool, bool) or bits not in get_args(Bits) or group < 0:
        fields = JsonFields(raw, where)
        raise fields.refuse(_FIELD, f"what scripts.compress wrote beside {FILE}")
    return raw | {_FIELD: None}, Packing(bits, group, input_scale, normal_float)


def is_quantized(directory: Path) -> bool:
    """Return whether the directory is of the kind that `write_directory` writes."""
    return (directory / FILE).is_file()


def write_directory(
    directory: Path,
    config: DecoderConfig,
    model: Decoder,
    settings: Json,
    *,
    dtype: Dtype,
    files: Mapping[str, bytes],
    generation: Json,
) -> None:
    """Write a model whose matrices are `Quantized`, with its other parameters in `dtype`. If it
    fails, nothing is left behind.

    The directory must be new or empty. `config`: that of the model, perhaps with other end tokens.
    `settings`: the method and the fields of its `Packing`. `files` and
    `generation` as those of `huggingface.write_directory`.
    """
    extra = {_FIELD: {"quant_method": _OWN, **settings}}
    number, plain = huggingface.numpy_dtype(dtype), layout_of(config).leaves
    with huggingface.model_directory(directory, config, dtype, files, generation, extra) as partial:
        tensors = {
            path: np.ascontiguousarray(cast(array, number, path) if path in plain else array)
            for path, value in flat_values(model).items()
            for array in [np.asarray(value)]
        }
        save_file(tensors, partial / FILE)
        # safetensors makes its files private; give them the mode that any new file has here.
        (partial / FILE).chmod((partial / huggingface.config_file(partial)[0]).stat().st_mode)


def open_directory(directory: Path) -> Weights:
    """Return the model in a directory that `write_directory` wrote. Only headers are read before a
    value is. `read` returns dequantized parameters."""
    config_path, model_type = huggingface.config_file(directory)
    where = str(config_path)
    raw, packing = packing_from_json(read_json(config_path), where)
    if packing is None:
        raise UserError(f"{where}: no {_FIELD}; accepted: what scripts.compress wrote")
    config = config_from_json(raw, where, model_type)
    config = huggingface.with_generation_ends(config, directory)
    path, expected = directory / FILE, _expected(config, packing)
    _check(path, expected)

    def stored(name: str) -> Any:
        with _open(path) as file:
            if name in expected:
                return file.get_tensor(name).astype(np.float32)
            parts = {
                part: file.get_tensor(f"{name}/{part}")
                for part in _PARTS
                if f"{name}/{part}" in expected
            }
            writes = layout_of(config).leaves[name].role == "write"
            return Quantized(**parts, writes=writes, normal_float=packing.normal_float)

    def read(name: str) -> np.ndarray:
        weight = stored(name)
        return np.asarray(weight.dense() if isinstance(weight, Quantized) else weight)

    generation = huggingface.read_generation(directory)
    return Weights(config, read, generation, (packing.format,), stored, packing)


@contextlib.contextmanager
def _open(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="np") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: cannot be read as safetensors: {error}") from error


def _expected(config: DecoderConfig, packing: Packing) -> _Shapes:
    """Return the tensors of a model."""
    matrices = dict(layout_of(config).with_role("read", "write"))
    dtypes = {"uint8": ("U8",), "int8": ("I8",), "float32": ("F32",)}
    result: _Shapes = {}
    for path, abstract in shapes(config).items():
        if path not in matrices:
            result[path] = (abstract.shape, _FLOATS)
            continue
        weight = packing.abstract(abstract.shape, matrices[path].role == "write")
        for part in _PARTS:
            if (array := getattr(weight, part)) is not None:
                result[f"{path}/{part}"] = (array.shape, dtypes[array.dtype.name])
    return result


def _check(path: Path, expected: _Shapes) -> None:
    """Raise `UserError` that names a tensor that is missing, unknown, or of another kind."""
    with _open(path) as file:
        pieces = {name: file.get_slice(name) for name in file.keys()}
        kinds = {n: (tuple(piece.get_shape()), piece.get_dtype()) for n, piece in pieces.items()}
    if names := sorted(expected.keys() ^ kinds.keys()):
        state = "is missing" if names[0] in expected else "is no tensor of this model"
        raise UserError(f"{path}: {names[0]} {state}; accepted: what scripts.compress wrote")
    for name, (shape, dtype) in kinds.items():
        if shape != expected[name][0] or dtype not in expected[name][1]:
            raise UserError(
                f"{path}: {name} is {dtype} {list(shape)}; accepted:"
                f" {' or '.join(expected[name][1])} {list(expected[name][0])}"
            )
