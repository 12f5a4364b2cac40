"""Hugging Face directories: safetensors weights, sharded or not, in and out."""

import json
import re
import shutil
import uuid
from collections.abc import Callable
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
    Row,
    Weights,
    check_tensors,
    is_lfs_pointer,
    stacked_reader,
    stored_tensors,
)
from sat_jax.models.llama_config import LlamaConfig
from sat_jax.models.build import layout_of

Dtype = Literal["float32", "bfloat16", "float16"]

SHARD_BYTES = 5_000_000_000
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
# Tables that old files carry among the weights; they follow from the config.
_NOT_PARAMETERS = re.compile(r"(model\.layers\.\d+\.self_attn|model)\.rotary_emb\.inv_freq")
_FLOATS = ("F64", "F32", "F16", "BF16")


def open_directory(directory: Path) -> Weights:
    """The model in a Hugging Face directory. Only headers are read until a value is asked for."""
    config_path = directory / "config.json"
    if not config_path.is_file():
        raise UserError(f"{directory}: no config.json; expected a Hugging Face directory")
    config = config_from_json(read_json(config_path), str(config_path))
    tensors = _Tensors(directory)
    found = {n: s for n, s in tensors.shapes.items() if not _NOT_PARAMETERS.fullmatch(n)}
    if config.tie_embeddings and "lm_head.weight" in found:
        _check_tied(tensors, directory)
        del found["lm_head.weight"]
    check_tensors(config, "huggingface", found, directory)
    return Weights(config, stacked_reader(config, "huggingface", tensors.fetch))


class _Tensors:
    """The tensors of all safetensors files of a directory, by name, memory-mapped."""

    def __init__(self, directory: Path):
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._files: dict[str, tuple[Path, Any]] = {}
        for path in _safetensors_files(directory):
            try:
                handle = safe_open(path, framework="np").__enter__()
                for name in handle.keys():
                    piece = handle.get_slice(name)
                    if name in self.shapes:
                        raise UserError(f"{path}: tensor {name} is also in another shard")
                    if piece.get_dtype() not in _FLOATS:
                        raise UserError(
                            f"{path}: tensor {name} has dtype {piece.get_dtype()}; "
                            f"accepted: {', '.join(_FLOATS)}"
                        )
                    self.shapes[name] = tuple(piece.get_shape())
                    self._files[name] = (path, handle)
            except (SafetensorError, OSError) as error:
                pointer = isinstance(error, SafetensorError) and is_lfs_pointer(path)
                why = LFS_POINTER if pointer else error
                raise UserError(f"{path}: cannot be read as safetensors: {why}") from error

    def fetch(self, name: str) -> np.ndarray:
        """One tensor, in the dtype it is stored in."""
        path, handle = self._files[name]
        try:
            return handle.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path}: tensor {name} cannot be read: {error}") from error


def _safetensors_files(directory: Path) -> list[Path]:
    if (directory / _SINGLE).is_file():
        return [directory / _SINGLE]
    index_path = directory / _INDEX
    if not index_path.is_file():
        found = sorted(p.name for p in directory.glob("*.bin")) or ["no weights"]
        raise UserError(f"{directory}: needs {_SINGLE} or {_INDEX}, found {', '.join(found[:3])}")
    names = read_json(index_path).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise UserError(f"{index_path}: no weight_map from tensor to file")
    files = [directory / name for name in sorted(set(names.values()))]
    for path in files:
        # A name with a folder in it could point anywhere.
        if path.parent != directory or not path.is_file():
            raise UserError(f"{index_path}: {path.name} is listed and is not in the directory")
    return files


def _check_tied(tensors: _Tensors, directory: Path) -> None:
    """A duplicate of the tied embedding is harmless only while it is equal to it."""
    if not np.array_equal(
        tensors.fetch("lm_head.weight"), tensors.fetch("model.embed_tokens.weight")
    ):
        raise UserError(
            f"{directory}: lm_head.weight differs from model.embed_tokens.weight, "
            "but config.json says tie_word_embeddings"
        )


def write_directory(
    directory: Path,
    config: LlamaConfig,
    read: Callable[[str], Any],
    *,
    dtype: Dtype = "float32",
    tokenizer_files_from: Path | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes a model so that transformers 4 and 5 load it; all of it or nothing.

    `read(path)` gives one stacked parameter and is called once for each. The directory must be new
    or empty. Tokenizer files are copied from the directory `tokenizer_files_from`.
    """
    if dtype not in get_args(Dtype):
        raise UserError(
            f"dtype {dtype!r} cannot be written; accepted: {', '.join(get_args(Dtype))}"
        )
    if directory.exists() and not (directory.is_dir() and not any(directory.iterdir())):
        raise UserError(f"{directory}: exists and is not an empty directory; give a new one")
    copied = [tokenizer_files_from / name for name in TOKENIZER_FILES if tokenizer_files_from]
    copied = [file for file in copied if file.is_file()]
    if tokenizer_files_from and not copied:
        raise UserError(
            f"{tokenizer_files_from}: no directory with tokenizer files; of a GGUF file,"
            " scripts.convert writes one"
        )
    raw = config_to_json(config, dtype)
    partial = directory.parent / f".{directory.name}.{uuid.uuid4().hex[:8]}.partial"
    try:
        partial.mkdir(parents=True)
        _write_json(partial / "config.json", raw)
        tokens = {key: raw[key] for key in ("bos_token_id", "eos_token_id")}
        _write_json(partial / "generation_config.json", {"_from_model_config": True, **tokens})
        _write_tensors(partial, config, read, dtype, shard_bytes)
        for file in copied:
            shutil.copyfile(file, partial / file.name)
        partial.rename(directory)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{directory}: cannot be written: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write_tensors(
    directory: Path,
    config: LlamaConfig,
    read: Callable[[str], Any],
    dtype: Dtype,
    shard_bytes: int,
) -> None:
    number = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    shards = _plan_shards(config, number.itemsize, shard_bytes)
    abstract = layout_of(config).shapes
    weight_map: dict[str, str] = {}
    path, parameter = "", np.empty(0)
    for i, shard in enumerate(shards):
        file = _SINGLE if len(shards) == 1 else f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
        tensors = {}
        for name, row, layer in shard:
            if row.path != path:
                path, parameter = row.path, np.asarray(read(row.path))
                if parameter.shape != abstract[path].shape:
                    raise ValueError(f"{path} is {parameter.shape}, not {abstract[path].shape}")
            one = row.stored(parameter if layer is None else parameter[layer])
            # safetensors writes the memory as it lies, so it has to lie in row order.
            tensors[name] = np.ascontiguousarray(one.astype(number))
            weight_map[name] = file
        save_file(tensors, directory / file, metadata={"format": "pt"})
        # safetensors makes its files private; give them the mode that any new file has here.
        (directory / file).chmod((directory / "config.json").stat().st_mode)
    if len(shards) > 1:
        size = sum(_count(shape) for *_, shape in stored_tensors(config, "huggingface"))
        metadata = {"total_size": size * number.itemsize}
        _write_json(directory / _INDEX, {"metadata": metadata, "weight_map": weight_map})


def _plan_shards(
    config: LlamaConfig, itemsize: int, limit: int
) -> list[list[tuple[str, Row, int | None]]]:
    """Which tensors go into which file, known before any is read. One parameter stays together."""
    shards: list[list[tuple[str, Row, int | None]]] = [[]]
    used = 0
    for name, row, layer, shape in stored_tensors(config, "huggingface"):
        size = _count(shape) * itemsize
        if used and used + size > limit:
            shards.append([])
            used = 0
        shards[-1].append((name, row, layer))
        used += size
    return shards


def _count(shape: tuple[int, ...]) -> int:
    return int(np.prod(shape))


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
