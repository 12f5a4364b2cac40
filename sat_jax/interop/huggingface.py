"""Hugging Face directories: safetensors weights, sharded or not, in and out."""

import contextlib
import dataclasses
import itertools
import json
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from sat_jax.errors import UserError
from sat_jax.interop.huggingface_config import config_from_json, config_to_json, read_json
from sat_jax.interop.weights import (
    LFS_POINTER,
    Weights,
    cast,
    check_tensors,
    is_lfs_pointer,
    joined_tensors,
    stacked_reader,
)
from sat_jax.models import registry
from sat_jax.models.build import shapes
from sat_jax.models.decoder_config import DecoderConfig
from sat_jax.models.format_fields import Json, JsonFields
from sat_jax.models.formats import HUGGINGFACE_FILES, ModelFormat, StoredTensor
from sat_jax.models.rope_formats import not_exportable
from sat_jax.nn.rope import as_longrope

Dtype = Literal["float32", "bfloat16", "float16"]

SHARD_BYTES = 5_000_000_000
_FLOATS = ("F64", "F32", "F16", "BF16")
_GENERATION = "generation_config.json"


def open_directory(directory: Path) -> Weights:
    """Return the model in a Hugging Face directory. Only headers are read before a value is."""
    config_path, model_type = config_file(directory)
    config = config_from_json(read_json(config_path), str(config_path), model_type)
    tensors = _Tensors(directory, registry.format_of(config))
    if config.tie_embeddings:
        _tie(tensors, config, directory)
    check_tensors(config, "huggingface", tensors.shapes, directory)
    generation, config = read_generation(directory), with_generation_ends(config, directory)
    return Weights(config, stacked_reader(config, "huggingface", tensors.fetch), generation)


def with_generation_ends(config: DecoderConfig, directory: Path) -> DecoderConfig:
    """Return the config with the end tokens of generation_config.json, if that has any:
    transformers stops at these and not at those of config.json."""
    fields = JsonFields(read_generation(directory), str(directory / _GENERATION))
    ends = fields.token_ids("eos_token_id")
    return dataclasses.replace(config, eos_token_ids=ends) if ends else config


def numpy_dtype(dtype: Dtype) -> np.dtype[Any]:
    """Return the dtype of NumPy with this name."""
    return np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)


def config_file(directory: Path) -> tuple[Path, str | None]:
    """Return the file of the config, and the model type that its name says. Raises `UserError` if
    the directory has none."""
    own_names = {
        form.files.config: name
        for name, form in registry.MODEL_TYPES.items()
        if form.files != HUGGINGFACE_FILES
    }
    for file, model_type in {HUGGINGFACE_FILES.config: None, **own_names}.items():
        if (directory / file).is_file():
            return directory / file, model_type
    raise UserError(
        f"{directory}: no {HUGGINGFACE_FILES.config}; expected a Hugging Face directory, or one"
        f" with {' or '.join(own_names)}"
    )


def read_generation(directory: Path) -> Json:
    """Return the settings in generation_config.json, none if the directory has no such file."""
    file = directory / _GENERATION
    return read_json(file) if file.is_file() else {}


class _Tensors:
    """The parameters' tensors in all safetensors files of a directory, by declared name."""

    def __init__(self, directory: Path, declared: ModelFormat):
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._stored: dict[str, tuple[Path, Any, str]] = {}
        for path in _safetensors_files(directory, declared.files.weights):
            try:
                handle = safe_open(path, framework="np").__enter__()
                for name in handle.keys():
                    full_name = declared.full_name(name)
                    if not declared.is_ignored(full_name):
                        self._add(full_name, path, handle, name)
            except (SafetensorError, OSError) as error:
                pointer = isinstance(error, SafetensorError) and is_lfs_pointer(path)
                why = LFS_POINTER if pointer else error
                raise UserError(f"{path}: cannot be read as safetensors: {why}") from error

    def _add(self, name: str, path: Path, handle: Any, stored_name: str) -> None:
        piece = handle.get_slice(stored_name)
        if name in self.shapes:
            other = self._stored[name][2]
            where = "in another shard" if other == stored_name else f"stored as {other}"
            raise UserError(f"{path}: tensor {stored_name} is also {where}")
        if piece.get_dtype() not in _FLOATS:
            raise UserError(
                f"{path}: tensor {stored_name} has dtype {piece.get_dtype()}; "
                f"accepted: {', '.join(_FLOATS)}"
            )
        self.shapes[name] = tuple(piece.get_shape())
        self._stored[name] = (path, handle, stored_name)

    def rename(self, name: str, new_name: str) -> None:
        """Declare a tensor under another name."""
        self.shapes[new_name] = self.shapes.pop(name)
        self._stored[new_name] = self._stored.pop(name)

    def fetch(self, name: str) -> np.ndarray:
        """Return one tensor, in the dtype it is stored in; float64 is converted to float32."""
        path, handle, stored_name = self._stored[name]
        try:
            tensor: np.ndarray = handle.get_tensor(stored_name)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path}: tensor {stored_name} cannot be read: {error}") from error
        return cast(tensor, np.float32, stored_name) if tensor.dtype == np.float64 else tensor


def _safetensors_files(directory: Path, stem: str) -> list[Path]:
    single, index_path = directory / f"{stem}.safetensors", directory / _index_name(stem)
    if single.is_file():
        return [single]
    if not index_path.is_file():
        found = sorted(p.name for p in directory.glob("*.bin")) or ["no weights"]
        raise UserError(
            f"{directory}: needs {single.name} or {index_path.name}, found {', '.join(found[:3])}"
        )
    names = read_json(index_path).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise UserError(f"{index_path}: no weight_map from tensor to file")
    files = [directory / name for name in sorted(set(names.values()))]
    for path in files:
        # A name with a folder in it could point anywhere.
        if path.parent != directory or not path.is_file():
            raise UserError(f"{index_path}: {path.name} is listed and is not in the directory")
    return files


def _index_name(stem: str) -> str:
    return f"{stem}.safetensors.index.json"


def _name_of(config: DecoderConfig, path: str) -> str:
    return registry.format_of(config).tensor_of(path).huggingface.name


def _tie(tensors: _Tensors, config: DecoderConfig, directory: Path) -> None:
    """Leave one of embedding and head, under the name of the embedding.

    Raises `UserError` if both are stored and differ.
    """
    head, embed = (_name_of(config, path) for path in ("lm_head", "embed"))
    if head not in tensors.shapes:
        return
    if embed not in tensors.shapes:
        tensors.rename(head, embed)
        return
    if not np.array_equal(tensors.fetch(head), tensors.fetch(embed)):
        raise UserError(
            f"{directory}: {head} differs from {embed}, but config.json says tie_word_embeddings"
        )
    del tensors.shapes[head]


def check_exportable(config: DecoderConfig) -> None:
    """Raise `UserError` for a model that transformers does not have."""
    if config.rope is not None and not config.rope.scaling.in_transformers:
        raise not_exportable(config.rope)


def write_directory(
    directory: Path,
    config: DecoderConfig,
    read: Callable[[str], Any],
    *,
    dtype: Dtype = "float32",
    files: Mapping[str, bytes] | None = None,
    generation: Json | None = None,
    longrope: bool = False,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write a model so that transformers 4 and 5 load it. If it fails, nothing is left behind.

    `read(path)` returns one stacked parameter and is called once for each. The directory must be
    new or empty. `files` are the contents of other files by name, such as those of a tokenizer, and
    `generation` the settings for generation_config.json. `longrope` writes a RoPE type that
    transformers does not have as `longrope` factors with the same frequencies.
    """
    if longrope and config.rope is not None and not config.rope.scaling.in_transformers:
        rope = as_longrope(config.rope, config.rotary_dim, config.max_positions)
        config = dataclasses.replace(config, rope=rope)  # type: ignore[call-arg]  # a field there
    check_exportable(config)
    with model_directory(directory, config, dtype, files or {}, generation or {}) as partial:
        _write_tensors(partial, config, read, dtype, shard_bytes)


@contextlib.contextmanager
def model_directory(
    directory: Path,
    config: DecoderConfig,
    dtype: Dtype,
    files: Mapping[str, bytes],
    generation: Json,
    extra: Json | None = None,
) -> Iterator[Path]:
    """Yield a folder that is `directory` after the block, as `new_directory` does, with all files
    but those of weights. `extra`: further fields of config.json."""
    if dtype not in get_args(Dtype):
        raise UserError(
            f"dtype {dtype!r} cannot be written; accepted: {', '.join(get_args(Dtype))}"
        )
    raw = config_to_json(config, dtype)
    with new_directory(directory) as partial:
        _write_json(partial / registry.format_of(config).files.config, raw | (extra or {}))
        _write_json(partial / _GENERATION, _generation_json(raw, generation))
        for name, content in files.items():
            (partial / name).write_bytes(content)
        yield partial


@contextlib.contextmanager
def new_directory(directory: Path) -> Iterator[Path]:
    """Yield a folder that is `directory`, which must be new or empty, after the block. If the block
    fails, nothing is left behind. Raises `UserError` for what cannot be written."""
    if directory.exists() and not (directory.is_dir() and not any(directory.iterdir())):
        raise UserError(f"{directory}: exists and is not an empty directory; give a new one")
    partial = directory.parent / f".{directory.name}.{uuid.uuid4().hex[:8]}.partial"
    try:
        partial.mkdir(parents=True)
        yield partial
        partial.rename(directory)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{directory}: cannot be written: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _generation_json(raw: Json, settings: Json) -> Json:
    """Return generation_config.json: `settings` with the end tokens of config.json."""
    if not settings:
        settings = {"_from_model_config": True}
    return {"bos_token_id": raw["bos_token_id"], **settings, "eos_token_id": raw["eos_token_id"]}


def _write_tensors(
    directory: Path,
    config: DecoderConfig,
    read: Callable[[str], Any],
    dtype: Dtype,
    shard_bytes: int,
) -> None:
    number = numpy_dtype(dtype)
    shards = _plan_shards(config, number.itemsize, shard_bytes)
    form = registry.format_of(config).files
    stem, mode = form.weights, (directory / form.config).stat().st_mode
    weight_map: dict[str, str] = {}
    planned = itertools.chain.from_iterable(shards)
    joined = joined_tensors(config, planned, "huggingface", read)
    for i, shard in enumerate(shards):
        part = "" if len(shards) == 1 else f"-{i + 1:05}-of-{len(shards):05}"
        file = f"{stem}{part}.safetensors"
        # safetensors writes the memory as it is, so it has to be in row-major order.
        tensors = {
            stored.name: np.ascontiguousarray(cast(tensor, number, stored.name))
            for stored, tensor in itertools.islice(joined, len(shard))
        }
        weight_map |= dict.fromkeys(tensors, file)
        save_file(tensors, directory / file, metadata={"format": "pt"})
        # safetensors makes its files private; give them the mode that any new file has here.
        (directory / file).chmod(mode)
    if len(shards) > 1:
        size = sum(_count(stored.shape) for shard in shards for stored in shard)
        metadata = {"total_size": size * number.itemsize}
        _write_json(directory / _index_name(stem), {"metadata": metadata, "weight_map": weight_map})


def _plan_shards(config: DecoderConfig, itemsize: int, limit: int) -> list[list[StoredTensor]]:
    """Return which tensors each file holds, before any is read. One parameter stays together."""
    shards: list[list[StoredTensor]] = [[]]
    used = 0
    for stored in _written_tensors(config):
        size = _count(stored.shape) * itemsize
        if used and used + size > limit:
            shards.append([])
            used = 0
        shards[-1].append(stored)
        used += size
    return shards


def _written_tensors(config: DecoderConfig) -> Iterator[StoredTensor]:
    declared = registry.format_of(config)
    for stored in declared.stored_tensors(shapes(config), "huggingface"):
        yield stored
        is_head = declared.files.tied_head and config.tie_embeddings
        if is_head and stored.tensor.paths == ("embed",):
            yield dataclasses.replace(stored, name=_name_of(config, "lm_head"))


def _count(shape: tuple[int, ...]) -> int:
    return int(np.prod(shape))


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
