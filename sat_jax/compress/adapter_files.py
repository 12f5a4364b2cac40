"""The two files of an adapter directory, checked against the settings that are implemented."""

import math
import re
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from sat_jax.compress.lora_tensors import PeftTensors
from sat_jax.errors import UserError
from sat_jax.interop.huggingface_config import read_json
from sat_jax.models.format_fields import JsonFields

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
_ADAPTER = re.compile(
    r"(.*)\.(lora_(?:A|B|magnitude_vector|embedding_A|embedding_B))(?:\.default)?(?:\.weight)?"
)
# Settings that would change the function, and their values that do not.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none", None),
    # Others change the base model, too.
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal", None),
    "layer_replication": (None,),
    "lora_bias": (False, None),
    "target_parameters": (None, []),
    "trainable_token_indices": (None,),
    "alora_invocation_tokens": (None,),
    "arrow_config": (None,),
    "use_qalora": (False, None),
    "use_bdlora": (False, None),
}


class AdapterFiles:
    """The tensors of an adapter directory in float32, by module and by name.

    `modules`: tensors by their name in PEFT (`lora_A`), of each module that has an adapter. `full`:
    tensors of parameters that were trained in full. `base_sha256`: what `fingerprint` returned for
    the base model, if this package wrote the directory.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        file = directory / CONFIG_FILE
        if not file.is_file():
            raise UserError(
                f"{directory}: no {CONFIG_FILE}; accepted: an adapter directory of PEFT"
            )
        self._fields = JsonFields(read_json(file), str(file))
        self._fields.check_neutral(_NEUTRAL)
        self.dora, self.rslora = (
            self._fields.flag(name, False) for name in ("use_dora", "use_rslora")
        )
        self.modules: dict[str, dict[str, np.ndarray]] = {}
        self.full: dict[str, np.ndarray] = {}
        self.base_sha256: str | None = None
        self._read(directory / WEIGHTS_FILE)

    def _read(self, path: Path) -> None:
        if not path.is_file():
            raise UserError(
                f"{path}: no such file; accepted: adapters that PEFT saved as safetensors"
            )
        try:
            with safe_open(path, framework="np") as file:
                self.base_sha256 = (file.metadata() or {}).get("base_sha256")
                tensors = {name: file.get_tensor(name) for name in file.keys()}
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path}: cannot be read as safetensors: {error}") from error
        for name, tensor in tensors.items():
            name = name.removeprefix(PREFIX)
            if match := _ADAPTER.fullmatch(name):
                module, kind = match.groups()
                self.modules.setdefault(module, {})[kind] = tensor.astype(np.float32)
            else:
                self.full[name] = tensor.astype(np.float32)

    def rename(self, module: Callable[[str], str], full: Callable[[str], str]) -> None:
        """Give modules and tensors the names that a model type declares."""
        self.modules = {module(name): tensors for name, tensors in self.modules.items()}
        self.full = {full(name): tensor for name, tensor in self.full.items()}

    def tie(self, embedding: str, head: str) -> None:
        """Leave out a head that is the embedding. Raises `UserError` if they differ."""
        if head not in self.full:
            return
        tensor = self.full.pop(head)
        if embedding not in self.full or not np.array_equal(tensor, self.full[embedding]):
            raise UserError(
                f"{self.directory}: {head} differs from {embedding}, which this model ties;"
                " accepted: the same values"
            )

    def check_names(self, modules: Collection[str], full: Collection[str]) -> None:
        """Raise `UserError` for a module that is no matrix of a layer, or a tensor that the model
        does not have."""
        unknown = sorted({*self.modules} - {*modules})
        if outside_layers := [name for name in unknown if f"{name}.weight" in full]:
            raise UserError(
                f"{self.directory}: an adapter of {outside_layers[0]} is not supported; accepted:"
                " adapters of matrices of layers"
            )
        unknown += sorted({*self.full} - {*full})
        if unknown:
            raise UserError(
                f"{self.directory}: the adapter is of another base model: {unknown[0]} is no part"
                " of this one; accepted: the model that it was trained on"
            )

    def check_complete(self, names: Collection[str]) -> None:
        """Raise `UserError` if tensors of a parameter that was trained in full are missing."""
        if missing := [name for name in names if name not in self.full]:
            raise UserError(
                f"{self.directory}: {missing[0]} is missing; accepted: that of all layers"
            )

    def module(self, name: str, inner: int, out: int) -> tuple[PeftTensors, float]:
        """Return the tensors of a module, which has so many inputs and outputs, and its scale."""
        arrays = self.modules[name]
        kinds = ["lora_A", "lora_B"] + ["lora_magnitude_vector"] * self.dora
        if sorted(arrays) != sorted(kinds):
            raise UserError(
                f"{self.directory}: {name} has {', '.join(sorted(arrays))}; accepted:"
                f" {', '.join(kinds)}"
            )
        tensors = PeftTensors(*(arrays[kind] for kind in kinds))
        rank = self._pattern("rank_pattern", "r", name, 8)
        expected = [(int(rank), inner), (out, int(rank)), (out,)]
        for kind, shape in zip(kinds, expected, strict=False):
            if arrays[kind].shape != shape:
                raise UserError(
                    f"{self.directory}: the adapter is of another base model: {kind} of {name} has"
                    f" shape {list(arrays[kind].shape)}, expected {list(shape)}"
                )
        alpha = self._pattern("alpha_pattern", "lora_alpha", name, 8)
        return tensors, alpha / (math.sqrt(rank) if self.rslora else rank)

    def alpha(self, rank: int, scale: float) -> float:
        """Return the alpha with which adapters of this rank have this scale."""
        return scale * (math.sqrt(rank) if self.rslora else rank)

    def _pattern(self, patterns: str, field: str, module: str, default: float) -> float:
        """Return the value of a field for a module: the first pattern that the end of its name
        matches, as in PEFT."""
        for pattern, value in (self._fields.raw.get(patterns) or {}).items():
            if re.fullmatch(rf"(.*\.)?({pattern})", module):
                return float(value)
        return self._fields.number(field, default)
