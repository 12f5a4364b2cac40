"""Models in and out: Hugging Face directories and GGUF files."""

import importlib.util
from pathlib import Path
from typing import Literal

from sat_jax.errors import UserError
from sat_jax.interop import gguf, huggingface, quantized
from sat_jax.interop.huggingface import Dtype
from sat_jax.interop.weights import Weights
from sat_jax.models.build import build, shapes
from sat_jax.nn.decoder import Compute, Decoder
from sat_jax.nn.layout import flat_values
from sat_jax.tokenizer_files import read_tokenizer_files

__all__ = [
    "Weights",
    "build_model",
    "load_model",
    "locate",
    "open_weights",
    "save_model",
]

_PACKAGE = "package:"


def locate(path: str | Path) -> Path:
    """`path`, or for `package:NAME` the one GGUF file inside that installed package.

    The package is found and not imported.
    """
    text = str(path)
    if not text.startswith(_PACKAGE):
        return Path(path).expanduser()
    name = text.removeprefix(_PACKAGE)
    spec = importlib.util.find_spec(name) if name.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"{text}: no package of that name is installed")
    folders = [Path(folder) for folder in spec.submodule_search_locations]
    files = sorted(file for folder in folders for file in folder.rglob("*.gguf"))
    if len(files) != 1:
        raise UserError(f"{text}: {len(files)} GGUF files in {folders[0]}; expected exactly one")
    return files[0]


def open_weights(path: str | Path) -> Weights:
    """The weights at `path`: a Hugging Face directory, one that `scripts.compress` quantized, a
    .gguf file, or `package:NAME`.

    Everything is checked against the config here; values are read when they are asked for.
    """
    place = locate(path)
    if place.is_dir():
        form = quantized if quantized.is_quantized(place) else huggingface
        return form.open_directory(place)
    if place.suffix == ".gguf":
        return gguf.open_file(place)
    problem = "neither a directory nor a .gguf file" if place.exists() else "no such path"
    raise UserError(
        f"{place}: {problem}; expected a local Hugging Face directory or GGUF file: nothing is"
        " downloaded here"
    )


def load_model(path: str | Path, dtype: Literal["float32", "bfloat16"] = "float32") -> Decoder:
    """The model at `path` (see `open_weights`), computing in `dtype`. Its parameters are float32,
    or those that `scripts.compress` quantized (`compress.merge_factors` dequantizes them)."""
    return build_model(open_weights(path), dtype)


def build_model(weights: Weights, dtype: Literal["float32", "bfloat16"]) -> Decoder:
    """The model with these weights, computing in `dtype`."""
    return build(weights.config, weights.stored or weights.read, Compute(dtype=dtype))


def save_model(
    model: Decoder,
    directory: str | Path,
    *,
    dtype: Dtype = "float32",
    tokenizer_files_from: str | Path | None = None,
    longrope: bool = False,
) -> None:
    """Write a Hugging Face directory (new or empty) that transformers 4 and 5 load.

    The tokenizer is no part of a model: its files, and the settings of generation_config.json, are
    copied from the Hugging Face directory `tokenizer_files_from`. None writes none, and text needs
    a tokenizer. `scripts.convert` makes such a directory of a GGUF file. `longrope` writes a RoPE
    type that transformers does not have as `longrope` factors with the same frequencies.
    """
    files, generation = {}, {}
    if tokenizer_files_from is not None:
        source = locate(tokenizer_files_from)
        files, generation = read_tokenizer_files(source), huggingface.read_generation(source)
        if not files:
            raise UserError(
                f"{source}: no directory with tokenizer files; of a GGUF file, scripts.convert"
                " writes one"
            )
    values = flat_values(model)
    if others := [path for path in shapes(model.config) if path not in values]:
        raise UserError(
            f"{others[0]} is not one array; accepted: a model without adapters, factors and"
            " quantized weights, as compress.merge_factors returns"
        )
    huggingface.write_directory(
        Path(directory).expanduser(),
        model.config,
        values.__getitem__,
        dtype=dtype,
        files=files,
        generation=generation,
        longrope=longrope,
    )
