"""Weights of a model, read from Hugging Face or GGUF files as its family declares them."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import DTypeLike

from sat_jax.errors import UserError
from sat_jax.models import registry
from sat_jax.models.build import shapes
from sat_jax.models.decoder_config import DecoderConfig
from sat_jax.models.format_fields import Json
from sat_jax.models.formats import Format, Shape, StoredTensor
from sat_jax.nn.quantized import Packing


@dataclasses.dataclass(frozen=True)
class Weights:
    """Weights in files: `read(path)` returns one parameter in float32, with layers stacked.

    `generation` has the settings of generation_config.json, if the weights come with them.
    `quantized` names the quantized types of the tensors in the files. If a model can compute with
    these, `stored(path)` returns a parameter as it is in the files: an array, or a `Weight`, which
    is stored by `packing`.
    """

    config: DecoderConfig
    read: Callable[[str], np.ndarray]
    generation: Json = dataclasses.field(default_factory=dict)
    quantized: tuple[str, ...] = ()
    stored: Callable[[str], Any] | None = None
    packing: Packing | None = None

    def check_not_quantized(self, where: object) -> None:
        """Raise `UserError` if these are weights that `scripts.compress` quantized."""
        if self.stored is not None:
            raise UserError(
                f"{where}: weights that are quantized already ({', '.join(self.quantized)});"
                " accepted: those of the model before, or those that scripts.convert dequantizes"
            )

    def check_packing(self, where: object) -> None:
        """Raise `UserError` if these are quantized weights of several packings."""
        if self.stored is not None and self.packing is None:
            raise UserError(
                f"{where}: matrices are in {' and '.join(self.quantized)}; accepted: one of them,"
                " as scripts.compress writes with --bits"
            )

    @property
    def paths(self) -> tuple[str, ...]:
        """Paths of all parameters."""
        return tuple(shapes(self.config))


LFS_POINTER = "a Git LFS pointer, whose content was not downloaded"


def is_lfs_pointer(path: Path) -> bool:
    """Return whether the file is a Git LFS pointer instead of the content."""
    head = b"version https://git-lfs"
    with path.open("rb") as file:
        return file.read(len(head)) == head


def cast(tensor: np.ndarray, dtype: DTypeLike, name: str) -> np.ndarray:
    """Return the tensor `name` in another dtype. Raises `UserError` if a finite value overflows."""
    with np.errstate(over="ignore"):
        converted = tensor.astype(dtype)
    overflow = np.isinf(converted) & np.isfinite(tensor)
    if overflow.any():
        limit = float(ml_dtypes.finfo(converted.dtype).max)
        raise UserError(
            f"tensor {name} has the value {tensor[overflow][0]:g}, which {converted.dtype} cannot"
            f" represent; accepted: up to {limit:g}, or a dtype with a larger range"
        )
    return converted


def check_tensors(
    config: DecoderConfig, form: Format, found: Mapping[str, Shape], where: object
) -> None:
    """Raise `UserError` that names tensors that are missing, unknown or of another shape."""
    if config.n_layers > len(found):
        raise UserError(f"{where}: config has {config.n_layers} layers, for {len(found)} tensors")
    stored = registry.format_of(config).stored_tensors(shapes(config), form)
    expected = {tensor.name: tensor.shape for tensor in stored}
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
    config: DecoderConfig, form: Format, fetch: Callable[[str], np.ndarray]
) -> Callable[[str], np.ndarray]:
    """Return `read(path)`, which assembles one parameter from the tensors that `fetch` returns."""
    abstract = shapes(config)
    declared = registry.format_of(config)

    def read(path: str) -> np.ndarray:
        tensor = declared.tensor_of(path)
        stored, index = tensor.stored(form), tensor.paths.index(path)
        full = [abstract[held].shape for held in tensor.paths]
        if not tensor.stacked:
            return stored.split(fetch(stored.name), full)[index].astype(np.float32)
        own = [shape[1:] for shape in full]
        out = np.empty(full[index], np.float32)
        for layer in range(len(out)):
            out[layer] = stored.split(fetch(stored.name.format(layer=layer)), own)[index]
        return out

    return read


def joined_tensors(
    config: DecoderConfig,
    tensors: Iterable[StoredTensor],
    form: Format,
    read: Callable[[str], Any],
) -> Iterator[tuple[StoredTensor, np.ndarray]]:
    """Yield tensors of a file with their values: the inverse of `stacked_reader`.

    `read(path)` returns one stacked parameter. It is called once for each, as long as the tensors
    of a parameter follow one another.
    """
    expected = shapes(config)
    held: dict[str, np.ndarray] = {}
    for stored in tensors:
        paths = stored.tensor.paths
        if held.keys() != set(paths):
            held.clear()
            held |= {path: np.asarray(read(path)) for path in paths}
            for path, parameter in held.items():
                if parameter.shape != expected[path].shape:
                    raise ValueError(f"{path} is {parameter.shape}, not {expected[path].shape}")
        layer = ... if stored.layer is None else stored.layer
        yield stored, stored.tensor.stored(form).join([held[path][layer] for path in paths])
