"""Directories of models whose matrices are quantized.

The file `quantized.safetensors` has the tensors of all layers, by the paths of the parameters:
`PATH/values`, `PATH/scale` and `PATH/input_scale` are the arrays of `nn.quantized.Quantized`. Where
some layers have 4 bits and others 8, their integers are in `PATH/values_4` and `PATH/values_8`; in
memory all have 8 bits. The config has the settings in `quantization_config`. transformers does not
find weights in such a directory, and refuses it.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, get_args

import jax.numpy as jnp
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
from sat_jax.nn.quantized import Bits, Packing, Quantized, pack, unpack

FILE = "quantized.safetensors"
_FIELD, _OWN = "quantization_config", "sat_jax"
_PARTS = ("values", "values_4", "values_8", "scale", "input_scale")
_FLOATS = ("F32", "F16", "BF16")
_DTYPES = {"uint8": ("U8",), "int8": ("I8",), "float32": ("F32",)}
_Shapes = dict[str, tuple[tuple[int, ...], tuple[str, ...]]]  # shape and dtypes by name


class _Settings(NamedTuple):
    """The settings in `quantization_config`: those of a `Packing`, with bits of all matrices or by
    path and layer."""

    bits: Bits | dict[str, list[Bits]]
    group: int
    input_scale: bool
    normal_float: bool = False  # missing in files of before NormalFloat

    @classmethod
    def of_json(cls, raw: Json, where: str, layers: Mapping[str, int]) -> "_Settings":
        """Return the settings in the config of a model with these matrices, by path their number of
        layers. Raises `UserError` for those of another program."""
        field = raw.get(_FIELD)
        known = field if isinstance(field, dict) and field.get("quant_method") == _OWN else {}
        values: dict[str, Any] = cls._field_defaults | {
            n: known.get(n) for n in cls._fields if n in known
        }
        types = tuple(type(values.get(name)) for name in cls._fields[1:])
        if (
            types != (int, bool, bool)
            or values["group"] < 0
            or not _are_bits(known.get("bits"), layers)
        ):
            raise JsonFields(raw, where).refuse(
                _FIELD, f"what scripts.compress wrote beside {FILE}"
            )
        return cls(**values)

    @property
    def packing(self) -> Packing | None:
        """How all matrices are stored; None where their bits differ."""
        return None if isinstance(self.bits, dict) else self._packing(self.bits)

    @property
    def formats(self) -> tuple[str, ...]:
        """The formats of the packings of all matrices and layers."""
        by_matrix = self.bits.values() if isinstance(self.bits, dict) else [[self.bits]]
        return tuple(self._packing(bits).format for bits in sorted(set().union(*by_matrix)))

    def by_layer(self, path: str, layers: int) -> list[Bits]:
        """Return the bits of a matrix in each layer."""
        return self.bits[path] if isinstance(self.bits, dict) else [self.bits] * layers

    def expected(self, path: str, shape: tuple[int, ...], writes: bool) -> _Shapes:
        """Return the tensors of a matrix `[L, *units, D]`, by name without the path."""
        by_layer = self.by_layer(path, shape[0])
        several = len(set(by_layer)) > 1
        result: _Shapes = {}
        for bits in sorted(set(by_layer)):
            weight = self._packing(bits).abstract(shape, writes)
            for part in ("values", "scale", "input_scale"):
                if (array := getattr(weight, part)) is None:
                    continue
                name, stored = part, array.shape
                if part == "values" and several:
                    name, stored = f"values_{bits}", (by_layer.count(bits), *stored[1:])
                result[name] = (stored, _DTYPES[array.dtype.name])
        return result

    def _packing(self, bits: Bits) -> Packing:
        return Packing(bits, self.group, self.input_scale, self.normal_float)


def formats(settings: Json) -> tuple[str, ...]:
    """Return the formats of matrices with these settings of `write_directory`."""
    return _Settings(*(settings[name] for name in _Settings._fields)).formats


def packing_to_json(packing: Packing) -> Json:
    """Return the field of a config that says how matrices are stored."""
    return {_FIELD: {"quant_method": _OWN, **packing._asdict()}}


def packing_from_json(raw: Json, where: str) -> tuple[Json, Packing | None]:
    """Return a config without this field, and how matrices are stored; None: as plain arrays.
    Raises `UserError` for the settings of another program, and for bits that differ."""
    if raw.get(_FIELD) is None:
        return raw, None
    return raw | {_FIELD: None}, _Settings.of_json(raw, where, {}).packing


def _are_bits(bits: Any, layers: Mapping[str, int]) -> bool:
    """Return whether this is a number of bits, or has one for each layer of all matrices."""
    if not isinstance(bits, dict):
        return type(bits) is int and bits in get_args(Bits)
    return bits.keys() == layers.keys() and all(
        isinstance(of_path, list)
        and len(of_path) == layers[path]
        and all(_are_bits(number, {}) and type(number) is int for number in of_path)
        for path, of_path in bits.items()
    )


def _with_bits(by_layer: Sequence[Bits], bits: Bits) -> list[int]:
    """Return the layers that have so many bits."""
    return [layer for layer, number in enumerate(by_layer) if number == bits]


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
    `settings`: the method and the fields of its `Packing`, with `bits` by path and layer if they
    differ; matrices with 4 bits in some layers alone are in 8 bits. `files` and `generation` as
    those of `huggingface.write_directory`.
    """
    extra = {_FIELD: {"quant_method": _OWN, **settings}}
    number, plain = huggingface.numpy_dtype(dtype), layout_of(config).leaves
    with huggingface.model_directory(directory, config, dtype, files, generation, extra) as partial:
        tensors = {
            path: np.ascontiguousarray(cast(array, number, path) if path in plain else array)
            for path, value in flat_values(model).items()
            for array in [np.asarray(value)]
        }
        if isinstance(settings["bits"], dict):
            for path, bits in settings["bits"].items():
                _split(tensors, path, bits)
        save_file(tensors, partial / FILE)
        # safetensors makes its files private; give them the mode that any new file has here.
        (partial / FILE).chmod((partial / huggingface.config_file(partial)[0]).stat().st_mode)


def open_directory(directory: Path) -> Weights:
    """Return the model in a directory that `write_directory` wrote. Only headers are read before a
    value is. `read` returns dequantized parameters."""
    config_path, model_type = huggingface.config_file(directory)
    raw, where = read_json(config_path), str(config_path)
    config = config_from_json(raw | {_FIELD: None}, where, model_type)
    layout = layout_of(config)
    layers = {path: layout.layers for path, _ in layout.with_role("read", "write")}
    settings = _Settings.of_json(raw, where, layers)
    config = huggingface.with_generation_ends(config, directory)
    path, expected = directory / FILE, _expected(config, settings)
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
            if name in layers and "values" not in parts:
                bits = settings.by_layer(name, layout.layers)
                parts["values"] = _joined(parts.pop("values_4"), parts.pop("values_8"), bits)
            writes = layout.leaves[name].role == "write"
            return Quantized(**parts, writes=writes, normal_float=settings.normal_float)

    def read(name: str) -> np.ndarray:
        weight = stored(name)
        return np.asarray(weight.dense() if isinstance(weight, Quantized) else weight)

    generation = huggingface.read_generation(directory)
    return Weights(config, read, generation, settings.formats, stored, settings.packing)


def _split(tensors: dict[str, np.ndarray], path: str, bits: Sequence[Bits]) -> None:
    """Replace the integers of a matrix by those of layers with 4 bits and those with 8."""
    if len(set(bits)) == 1:
        return
    values = tensors.pop(f"{path}/values")
    tensors[f"{path}/values_4"] = pack(values[_with_bits(bits, 4)])
    tensors[f"{path}/values_8"] = values[_with_bits(bits, 8)]


def _joined(values_4: np.ndarray, values_8: np.ndarray, bits: Sequence[Bits]) -> np.ndarray:
    """Return the integers of all layers, in 8 bits."""
    values = np.empty((len(bits), *values_8.shape[1:]), np.int8)
    values[_with_bits(bits, 4)] = unpack(jnp.asarray(values_4))
    values[_with_bits(bits, 8)] = values_8
    return values


@contextlib.contextmanager
def _open(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="np") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: cannot be read as safetensors: {error}") from error


def _expected(config: DecoderConfig, settings: _Settings) -> _Shapes:
    """Return the tensors of a model."""
    matrices = dict(layout_of(config).with_role("read", "write"))
    result: _Shapes = {}
    for path, abstract in shapes(config).items():
        if path not in matrices:
            result[path] = (abstract.shape, _FLOATS)
            continue
        parts = settings.expected(path, abstract.shape, matrices[path].role == "write")
        result |= {f"{path}/{part}": stored for part, stored in parts.items()}
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
