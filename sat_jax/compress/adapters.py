"""Adapter directories in the format of PEFT: `adapter_config.json` and `adapter_model.safetensors`.

PEFT names tensors by the modules of transformers. A module whose tensor holds several parameters,
such as query, key and value, has one pair of matrices. It is written with their A one below the
other, and a B that has 0 where an output does not read an A: the same function, of a higher rank.
Read from a file, each parameter gets its rows of B, and the whole A.
"""

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save

from sat_jax.compress.adapter_files import CONFIG_FILE, PREFIX, WEIGHTS_FILE, AdapterFiles
from sat_jax.compress.lora import (
    adapters_of,
    check_plain,
    target_paths,
    without_adapters,
)
from sat_jax.compress.lora_tensors import Adapter, PeftTensors, from_peft, sizes, to_peft
from sat_jax.errors import UserError
from sat_jax.interop import locate
from sat_jax.interop.huggingface import new_directory
from sat_jax.interop.weights import Weights, joined_tensors, stacked_reader
from sat_jax.models import registry
from sat_jax.models.build import layout_of, shapes
from sat_jax.models.decoder_config import DecoderConfig
from sat_jax.models.format_fields import Json
from sat_jax.models.formats import StoredTensor, Tensor
from sat_jax.nn.decoder import Decoder
from sat_jax.nn.layout import parameters
from sat_jax.nn.linear import dense
from sat_jax.nn.lora import Lora, LoraSettings
from sat_jax.nn.low_rank import LowRank

Read = Callable[[str], Any]


def save_adapter(model: Decoder, directory: str | Path, base: str | None = None) -> None:
    """Write the adapters of a model to a directory (new or empty) that PEFT loads. `base`: name or
    path of the base model, for the reader of the config.

    Parameters that were trained in full are not part of it. Raises `UserError` for a model without
    adapters.
    """
    loras = adapters_of(model)
    if not loras:
        raise UserError("the model has no adapters; accepted: one that with_new_adapters returned")
    read = _reader(without_adapters(model))
    write_adapter(Path(directory).expanduser(), model.config, loras, read, base=base)


def load_adapter(model: Decoder, directory: str | Path) -> Decoder:
    """Return the model with the adapters of a directory that PEFT or this package wrote.

    Raises `UserError` if they are of another base model: names or shapes differ or, of a directory
    that this package wrote, the adapted matrices themselves.
    """
    check_plain(model)
    values = parameters(model)
    replaced = read_adapter(locate(directory), model.config, _reader(model))
    for path, new in replaced.items():
        on_device = jax.tree.map(jnp.asarray, new)
        values[path] = _on_base(on_device, values[path])
    return layout_of(model.config, model.compute).bind(values)


def _reader(model: Decoder) -> Read:
    """Return a function that returns a parameter of a model, as one array, by path."""
    values = parameters(model)
    return lambda path: dense(values[path])


def adapted_weights(weights: Weights, directory: str | Path) -> Weights:
    """Return the weights of a model with the adapters of a directory merged; errors as those of
    `load_adapter`."""
    replaced = read_adapter(locate(directory), weights.config, weights.read)

    def read(path: str) -> np.ndarray:
        if path not in replaced:
            return weights.read(path)
        new = replaced[path]
        if isinstance(new, Lora):
            new = _on_base(new, weights.read(path)).dense()
        return np.asarray(new)

    return dataclasses.replace(weights, read=read, stored=None, packing=None)


def _on_base(new: Any, base: Any) -> Any:
    """Return an adapted weight with its base; a parameter that was trained in full has none."""
    return dataclasses.replace(new, base=base) if isinstance(new, Lora) else new


def write_adapter(
    directory: Path,
    config: DecoderConfig,
    loras: Mapping[str, Lora],
    read: Read,
    full: Collection[str] = (),
    base: str | None = None,
) -> None:
    """Write adapted weights, whose own bases are not read, and the parameters `full`.

    `read(path)` returns a parameter: one that was trained in full, or is frozen and has an adapter
    or is part of a module that has one. The directory must be new or empty.
    """
    modules = list(_modules(config, loras))
    trained_in_full = list(_full_tensors(config, full, read))
    tensors = {f"{PREFIX}{name}": tensor for name, tensor in trained_in_full}
    for module in modules:
        tensors |= module.named_tensors()
    paths = {path for module in modules for path in module.declared.paths}
    metadata = {"format": "pt", "base_sha256": fingerprint(paths, read)}
    settings = _config_json(
        modules, [name for name, _ in trained_in_full], next(iter(loras.values())), base
    )
    arrays = {
        name: np.ascontiguousarray(tensor, np.float32) for name, tensor in sorted(tensors.items())
    }
    with new_directory(directory) as folder:
        (folder / CONFIG_FILE).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        (folder / WEIGHTS_FILE).write_bytes(save(arrays, metadata))


class _Module(NamedTuple):
    """A module of PEFT with an adapter. `transposed`: its weight is stored as `[in, out]`."""

    name: str
    declared: Tensor
    tensors: PeftTensors
    alpha: float
    transposed: bool

    @property
    def rank(self) -> int:
        return len(self.tensors.a)

    def named_tensors(self) -> dict[str, np.ndarray]:
        name, (a, b, magnitude) = f"{PREFIX}{self.name}", self.tensors
        named = {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}
        if magnitude is not None:
            named[f"{name}.lora_magnitude_vector"] = magnitude
        return named


def _modules(config: DecoderConfig, loras: Mapping[str, Lora]) -> Iterator[_Module]:
    for stored in _stored(config):
        declared, place = stored.tensor, stored.tensor.huggingface
        adapted = [loras.get(path) for path in declared.paths]
        first = next((lora for lora in adapted if lora is not None), None)
        if first is None:
            continue
        adapters = [_of_layer(lora, stored.layer) for lora in adapted]
        tensors = to_peft(place, _layer_shapes(config, declared), adapters, first.writes)
        # The scale stays that of the parameter's own rank.
        grown = len(tensors.a) / first.update.rank
        alpha = first.alpha * (math.sqrt(grown) if first.rslora else grown)
        transposed = (place.layout == "columns") != first.writes
        yield _Module(_module(stored.name), declared, tensors, alpha, transposed)


def read_adapter(directory: Path, config: DecoderConfig, read: Read) -> dict[str, Any]:
    """Return what the files of an adapter replace in a model, by path: adapted weights without
    their bases, and parameters that were trained in full.

    All arrays are on the host. `read(path)` returns a parameter of the model.
    """
    files = AdapterFiles(directory)
    stored = list(_stored(config))
    full_name = registry.format_of(config).full_name
    files.rename(lambda module: _module(full_name(f"{module}.weight")), full_name)
    if config.tie_embeddings:
        files.tie(*(_huggingface_name(config, path) for path in ("embed", "lm_head")))
    matrices = [s for s in stored if _is_matrix(config, s.tensor)]
    files.check_names({_module(s.name) for s in matrices}, {s.name for s in stored})
    replaced: dict[str, Any] = {}
    for declared in registry.format_of(config).tensors:
        layers = [s for s in stored if s.tensor is declared]
        if layers and _is_matrix(config, declared):
            replaced |= _adapted(files, config, declared, layers)
        names = [s.name for s in layers]
        if any(name in files.full for name in names):
            files.check_complete(names)
            read_full = stacked_reader(config, "huggingface", files.full.__getitem__)
            replaced |= {path: read_full(path) for path in declared.paths}
    loras = [path for path, weight in replaced.items() if isinstance(weight, Lora)]
    if files.base_sha256 not in (None, fingerprint(loras, read)):
        raise UserError(
            f"{directory}: the adapter is of another base model, with other weights in the adapted"
            " matrices; accepted: the model that it was trained on"
        )
    return replaced


def fingerprint(paths: Collection[str], read: Read) -> str:
    """Return a hash of the parameters at these paths, as float32."""
    digest = hashlib.sha256()
    for path in sorted(paths):
        digest.update(path.encode())
        digest.update(np.ascontiguousarray(read(path), np.float32).tobytes())
    return digest.hexdigest()


def check_expressible(config: DecoderConfig, settings: LoraSettings) -> None:
    """Raise `UserError` for adapters that PEFT's format cannot express: DoRA of a part of the
    parameters that one module holds."""
    targets = set(target_paths(layout_of(config), settings.targets))
    for declared in registry.format_of(config).tensors:
        adapted = targets & set(declared.paths)
        if settings.dora and adapted and adapted < set(declared.paths):
            names = ", ".join(path.removeprefix("layers/") for path in declared.paths)
            raise UserError(
                f"lora.dora with {', '.join(settings.targets)}: the module {_target(declared)}"
                f" holds {names}; accepted: all of them in lora.targets, or none"
            )


def _adapted(
    files: AdapterFiles,
    config: DecoderConfig,
    declared: Tensor,
    stored: Sequence[StoredTensor],
) -> dict[str, Lora]:
    """Return the adapted weights of the parameters that a declared tensor holds, if they have
    adapters. A layer without one gets factors that are 0; a smaller rank is filled up with 0."""
    place, one_layer = declared.huggingface, _layer_shapes(config, declared)
    writes = layout_of(config).leaves[declared.paths[0]].role == "write"
    inner, out = sizes(place, one_layer, writes)
    names = {s.layer: _module(s.name) for s in stored}
    by_layer = {n: files.module(m, inner, out) for n, m in names.items() if m in files.modules}
    if not by_layer:
        return {}
    if files.dora and len(by_layer) < len(stored):
        raise UserError(
            f"{files.directory}: DoRA in {len(by_layer)} of {len(stored)} layers of"
            f" {_target(declared)}; accepted: in all layers"
        )
    rank = max(len(tensors.a) for tensors, _ in by_layer.values())
    scale = next(iter(by_layer.values()))[1]
    alpha, rslora = files.alpha(rank, scale), files.rslora
    layers: list[list[Adapter]] = []
    for number in names:
        tensors, own_scale = by_layer.get(number, (_zeros(rank, inner, out), scale))
        filled = _filled(tensors, rank, own_scale / scale)
        layers.append(from_peft(place, one_layer, filled, writes))
    loras = {}
    for path, parts in zip(declared.paths, zip(*layers, strict=True), strict=True):
        left, right, magnitude = (
            None if part[0] is None else np.stack(part)
            for part in zip(*(adapter[:3] for adapter in parts), strict=True)
        )
        loras[path] = _lora(left, right, magnitude, alpha, rslora, writes)
    return loras


def _lora(left: Any, right: Any, magnitude: Any, *settings: Any) -> Lora:
    """Return an adapted weight whose arrays are on the host, without its base."""
    return Lora(None, LowRank(left, right), magnitude, *settings)


def _zeros(rank: int, inner: int, out: int) -> PeftTensors:
    return PeftTensors(np.zeros((rank, inner), np.float32), np.zeros((out, rank), np.float32))


def _filled(tensors: PeftTensors, rank: int, factor: float) -> PeftTensors:
    """Return tensors of this rank, whose B is multiplied by `factor`."""
    missing = rank - len(tensors.a)
    b = tensors.b if factor == 1 else (factor * tensors.b).astype(np.float32)
    a = np.pad(tensors.a, ((0, missing), (0, 0)))
    return tensors._replace(a=a, b=np.pad(b, ((0, 0), (0, missing))))


def _stored(config: DecoderConfig) -> Iterator[StoredTensor]:
    return registry.format_of(config).stored_tensors(shapes(config), "huggingface")


def _is_matrix(config: DecoderConfig, declared: Tensor) -> bool:
    """Whether the tensor holds matrices of layers."""
    leaf = layout_of(config).leaves.get(declared.paths[0])
    return leaf is not None and leaf.in_layers and leaf.role in ("read", "write")


def _layer_shapes(config: DecoderConfig, declared: Tensor) -> list[tuple[int, ...]]:
    return [shapes(config)[path].shape[1:] for path in declared.paths]


def _of_layer(lora: Lora | None, layer: int | None) -> Adapter | None:
    if lora is None:
        return None
    left, right = (np.asarray(factor)[layer] for factor in (lora.update.left, lora.update.right))
    magnitude = None if lora.magnitude is None else np.asarray(lora.magnitude)[layer]
    return Adapter(left, right, magnitude, lora.scale)


def _full_tensors(
    config: DecoderConfig, full: Collection[str], read: Read
) -> Iterator[tuple[str, np.ndarray]]:
    """Yield names and values of tensors that were trained in full. A tied head is one of them,
    since PEFT does not tie it."""
    kept = [stored for stored in _stored(config) if set(stored.tensor.paths) <= set(full)]
    for stored, tensor in joined_tensors(config, kept, "huggingface", read):
        yield stored.name, tensor
    if config.tie_embeddings and "embed" in full:
        yield _huggingface_name(config, "lm_head"), np.asarray(read("embed"))


def _huggingface_name(config: DecoderConfig, path: str) -> str:
    return registry.format_of(config).tensor_of(path).huggingface.name


def _module(name: str) -> str:
    """Return the name of the module that a tensor belongs to."""
    return name.rpartition(".")[0]


def _target(declared: Tensor) -> str:
    """Return the end of the names of a tensor's modules in all layers."""
    return _end(_module(declared.huggingface.name).replace("{layer}", "0"))


def _end(module: str) -> str:
    """Return a module's name behind the number of its layer, if it has one."""
    return re.split(r"\.\d+\.", module)[-1]


def _config_json(
    modules: Sequence[_Module], saved: Sequence[str], lora: Lora, base: str | None
) -> Json:
    by_target = {_end(module.name): module for module in modules}
    rank, alpha = modules[0].rank, modules[0].alpha
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": _number(alpha),
        "lora_dropout": 0.0,
        "use_rslora": lora.rslora,
        "use_dora": lora.magnitude is not None,
        "target_modules": list(by_target),
        "rank_pattern": {name: m.rank for name, m in by_target.items() if m.rank != rank},
        "alpha_pattern": {
            name: _number(m.alpha) for name, m in by_target.items() if m.alpha != alpha
        },
        "modules_to_save": list(dict.fromkeys(_end(_module(name)) for name in saved)) or None,
        "fan_in_fan_out": any(module.transposed for module in modules),
        "bias": "none",
        "init_lora_weights": True,
    }


def _number(value: float) -> float | int:
    return int(value) if float(value).is_integer() else value
