"""The exported model of a run: a Hugging Face directory, that of its adapters, and one with packed
matrices."""

import shutil
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sat_jax.compress.adapters import write_adapter
from sat_jax.compress.lora import base_reader, target_paths
from sat_jax.compress.packed import quantized_reader
from sat_jax.config import Config
from sat_jax.data.data_format import DataFormat
from sat_jax.interop import locate, quantized
from sat_jax.interop.huggingface import write_directory
from sat_jax.models.build import layout_of
from sat_jax.nn.layout import merged_reader, weight_reader
from sat_jax.sparsity.stored_blocks import dense_reader
from sat_jax.train.layouts import trained_quantization
from sat_jax.train.run_weights import exported, generation_settings
from sat_jax.train.setup import Task
from sat_jax.train.workdir import WorkDir

Read = Callable[[str], np.ndarray]


def writes_adapter(config: Config) -> bool:
    """Return whether a run writes an adapter directory."""
    return config.export.huggingface and config.lora.rank > 0


def writes_quantized(config: Config) -> bool:
    """Return whether a run writes a directory with packed matrices."""
    return config.export.huggingface and config.quantization.bits is not None


def export_run(task: Task, workdir: WorkDir, read: Read, names: Collection[str]) -> None:
    """Write the model as one array a parameter, with adapters merged or matrices rounded as in
    training, and beside it the adapters by themselves, or packed matrices.

    `read(path)` returns the arrays `names` of the run. What an end that was interrupted has left is
    replaced.
    """
    config = task.config
    dense = dense_reader(read, names, task.layout.shapes)
    model = exported(task.model, task.tokenizer, DataFormat.from_settings(config.data))
    options: dict[str, Any] = {
        "files": task.tokenizer.files(),
        "generation": generation_settings(config, task.weights),
    }
    write_directory(_cleared(workdir.export), model, merged_reader(dense, task.layout), **options)
    if writes_adapter(config):
        _export_adapter(task, _cleared(workdir.adapter), read)
    if (method := trained_quantization(config)) is not None:
        layout = layout_of(task.model)
        packed = quantized_reader(read, layout, method)
        weights = {path: jax.tree.map(jnp.asarray, packed(path)) for path in layout.leaves}
        quantized.write_directory(
            *(_cleared(workdir.quantized), model, layout.bind(weights), method.file_settings),
            dtype="float32",
            **options,
        )


def _cleared(directory: Path) -> Path:
    shutil.rmtree(directory, ignore_errors=True)
    return directory


def _export_adapter(task: Task, directory: Path, read: Read) -> None:
    targets, path = task.config.lora.targets, task.config.model.path
    plain, adapted = layout_of(task.model), task.layout
    weight = weight_reader(read, adapted)
    # The name of a base model is the path of a Hugging Face directory.
    base = path if path is not None and locate(path).is_dir() else None
    write_adapter(
        directory,
        task.model,
        {p: weight(p) for p in target_paths(plain, targets)},
        base_reader(read, adapted),
        [p for p in plain.leaves if p in adapted.leaves and adapted.leaves[p].trained],
        base,
    )
