"""Compressed layers on disk, from which a compression that was killed continues."""

import dataclasses
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from sat_jax.compress.layers import CompressedLayer
from sat_jax.errors import UserError
from sat_jax.nn.low_rank import LowRank
from sat_jax.nn.quantized import Quantized

_SETTINGS = "settings.json"
_DENSE = "dense"  # the group of tensors of the matrices themselves


class SavedLayers:
    """The compressed layers in `folder`, which is made for a compression with these settings.

    `settings` is JSON that determines the result. Raises `UserError` for a folder of other
    settings.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        self.folder = folder
        text, file = json.dumps(settings, indent=2, sort_keys=True), folder / _SETTINGS
        if file.exists() and file.read_text(encoding="utf-8") != text:
            raise UserError(
                f"{folder}: has layers of a compression with other settings; accepted: the command"
                " that began it, or remove the folder to begin again"
            )
        try:
            folder.mkdir(parents=True, exist_ok=True)
            file.write_text(text, encoding="utf-8")
        except OSError as error:
            raise UserError(f"{folder}: cannot be written: {error}") from error

    def read(self, layer: int) -> tuple[CompressedLayer, dict[str, np.ndarray]] | None:
        """Return a layer and its weights by path, or None if it has to be compressed."""
        try:
            with safe_open(self._file(layer), framework="numpy") as file:
                values = json.loads(file.metadata()["layer"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}
        except (FileNotFoundError, SafetensorError):
            return None
        groups: dict[str, dict[str, dict[str, np.ndarray]]] = {}
        for name, tensor in tensors.items():
            group, path, field = name.split(":")
            groups.setdefault(group, {}).setdefault(path, {})[field] = tensor
        factors: dict[str, Any] = groups.get("factors", {})
        quantized: dict[str, Any] = groups.get("quantized", {})
        result = CompressedLayer(
            layer,
            values["removed"],
            values["error"],
            {path: LowRank(**fields) for path, fields in factors.items()},
            {
                path: Quantized(
                    **fields,
                    writes=values["writes"][path],
                    normal_float=values.get("normal_float", False),
                )
                for path, fields in quantized.items()
            },
        )
        return result, {path: fields[_DENSE] for path, fields in groups[_DENSE].items()}

    def write(self, layer: CompressedLayer, weights: Mapping[str, np.ndarray]) -> None:
        """Save a layer with its weights by path. A crash leaves the whole layer or nothing."""
        tensors = {f"{_DENSE}:{path}:{_DENSE}": weight for path, weight in weights.items()}
        for group in ("factors", "quantized"):
            for path, weight in getattr(layer, group).items():
                for field in dataclasses.fields(weight):
                    value = getattr(weight, field.name)
                    if isinstance(value, np.ndarray):
                        tensors[f"{group}:{path}:{field.name}"] = value
        writes = {path: weight.writes for path, weight in layer.quantized.items()}
        normal_float = any(weight.normal_float for weight in layer.quantized.values())
        values = {"removed": layer.removed, "error": layer.error, "writes": writes}
        values["normal_float"] = normal_float
        metadata = {"layer": json.dumps(values)}
        new = self.folder / "new"
        save_file({k: np.ascontiguousarray(v) for k, v in tensors.items()}, new, metadata)
        os.replace(new, self._file(layer.layer))

    def json(self, name: str, compute: Callable[[], Any]) -> Any:
        """Return what `compute` returned before; if it did not, call it and save what it returns,
        which is JSON."""
        file = self.folder / f"{name}.json"
        if not file.exists():
            new = self.folder / "new"
            new.write_text(json.dumps(compute()), encoding="utf-8")
            os.replace(new, file)
        return json.loads(file.read_text(encoding="utf-8"))

    def count(self) -> int:
        """Return the number of saved layers."""
        return sum(1 for _ in self.folder.glob("layer-*.safetensors"))

    def remove(self) -> None:
        """Delete all layers, when the model is written."""
        shutil.rmtree(self.folder)

    def _file(self, layer: int) -> Path:
        return self.folder / f"layer-{layer}.safetensors"
