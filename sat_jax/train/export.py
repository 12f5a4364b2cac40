"""The exported model of a run: a Hugging Face directory, and that of its adapters."""

import shutil
from collections.abc import Callable, Collection
from pathlib import Path

import numpy as np

from sat_jax.compress.adapters import write_adapter
from sat_jax.compress.lora import base_reader, target_paths
from sat_jax.config import Config
from sat_jax.data.data_format import DataFormat
from sat_jax.interop import locate
from sat_jax.interop.huggingface import write_directory
from sat_jax.models.build import layout_of
from sat_jax.nn.layout import merged_reader, weight_reader
from sat_jax.sparsity.stored_blocks import dense_reader
from sat_jax.train.run_weights import exported, generation_settings
from sat_jax.train.setup import Task
from sat_jax.train.workdir import WorkDir

Read = Callable[[str], np.ndarray]


def writes_adapter(config: Config) -> bool:
    """Return whether a run writes an adapter directory."""
    return config.export.huggingface and config.lora.rank > 0


def export_run(task: Task, workdir: WorkDir, read: Read, names: Collection[str]) -> None:
    """Write the model, with its adapters merged, and the adapters by themselves.

    `read(path)` returns the arrays `names` of the run. What an end that was interrupted has left is
    replaced.
    """
    config = task.config
    dense = dense_reader(read, names, task.layout.shapes)
    write_directory(
        _cleared(workdir.export),
        exported(task.model, task.tokenizer, DataFormat.from_settings(config.data)),
        merged_reader(dense, task.layout),
        files=task.tokenizer.files(),
        generation=generation_settings(config, task.weights),
    )
    if writes_adapter(config):
        _export_adapter(task, _cleared(workdir.adapter), read)


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
