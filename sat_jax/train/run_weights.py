"""Weights of a run: the initial ones, and those of its checkpoints."""

import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Literal, NamedTuple

import jax.numpy as jnp
import numpy as np

from sat_jax import interop
from sat_jax.compress.adapters import adapted_weights, load_adapter
from sat_jax.config import Config
from sat_jax.config_values import from_config_dict
from sat_jax.data.data_format import DataFormat
from sat_jax.data.end_of_turn import end_of_turn
from sat_jax.data.tokenizer import Tokenizer
from sat_jax.errors import UserError
from sat_jax.interop import Weights, open_weights
from sat_jax.interop.huggingface_config import config_from_json
from sat_jax.interop.quantized import packing_from_json
from sat_jax.models.decoder_config import DecoderConfig
from sat_jax.models.format_fields import Json
from sat_jax.models.presets import extended, preset, resized
from sat_jax.nn.decoder import Compute, Decoder
from sat_jax.nn.layout import Layout, merged_reader
from sat_jax.nn.quantized import Packing
from sat_jax.sparsity.execution.mask import as_floats, unit_masks
from sat_jax.sparsity.rows import Kept
from sat_jax.sparsity.stored_blocks import dense_reader
from sat_jax.train.checkpoint import Checkpoint, find
from sat_jax.train.files import read_json
from sat_jax.train.layouts import run_layout
from sat_jax.train.manifest import MANIFEST, digests
from sat_jax.train.workdir import WorkDir


def is_run(path: Path) -> bool:
    """Return whether `path` is the work directory of a run."""
    return WorkDir(path).checkpoints.is_dir()


def model_fingerprint(path: Path) -> str:
    """Return the hash of the weights in a Hugging Face directory or a GGUF file; of a run, that of
    its newest checkpoint."""
    if is_run(path):
        return digests(find(WorkDir(path).checkpoints).path, [MANIFEST])[0]
    if path.is_file():
        return digests(path.parent, [path.name])[0]
    names = sorted(file.name for file in path.glob("*.safetensors"))
    content = "".join([(path / "config.json").read_text(), *digests(path, names)])
    return hashlib.sha256(content.encode()).hexdigest()


def open_run(path: Path, step: int | None = None) -> tuple[Weights, Config]:
    """Return the weights of the run in `path` after `step` (None: its newest valid checkpoint), and
    its settings.

    One parameter is read at a time, and the base model is not needed. Raises `UserError` if the
    checkpoint is of another model.
    """
    run = _open(WorkDir(path), step)
    read = merged_reader(run.read, run.layout())
    return Weights(run.model, read, run.generation), run.config


class _StoredRun(NamedTuple):
    """A checkpoint of a run, its settings and its model. `stored`: how the matrices of its
    `model.path` are quantized. `read` returns an array of its layout by path, dense, on the
    host."""

    checkpoint: Checkpoint
    config: Config
    model: DecoderConfig
    stored: Packing | None
    generation: Json
    read: Callable[[str], np.ndarray]

    def layout(self, compute: Compute = Compute()) -> Layout[Decoder]:
        """Return the layout of the run's arrays."""
        return run_layout(self.config, self.model, compute, self.stored)


def _open(workdir: WorkDir, step: int | None) -> _StoredRun:
    config = from_config_dict(read_json(workdir.config))
    where = str(workdir.model)
    raw, stored = packing_from_json(read_json(workdir.model), where)
    model = config_from_json(raw, where)
    checkpoint = find(workdir.checkpoints, step)
    prefix, layout = "params/", run_layout(config, model, stored=stored)
    names = {n.removeprefix(prefix) for n in checkpoint.leaves if n.startswith(prefix)}
    for name, expected in layout.shapes.items():
        leaf = checkpoint.leaves.get(f"{prefix}{name}")
        if leaf is None and f"{name}/blocks" in names:
            continue
        if leaf is None or leaf.shape != expected.shape:
            raise UserError(
                f"checkpoint {checkpoint.path} is not of the model in {workdir.config}: {name} is"
                f" {'missing' if leaf is None else list(leaf.shape)}, not {list(expected.shape)}"
            )

    def read(name: str) -> np.ndarray:
        return np.asarray(checkpoint.read([f"{prefix}{name}"])[f"{prefix}{name}"])

    generation = read_json(workdir.generation) if workdir.generation.exists() else {}
    dense = dense_reader(read, names, layout.shapes)
    return _StoredRun(checkpoint, config, model, stored, generation, dense)


def load_model(
    path: str | Path,
    dtype: Literal["float32", "bfloat16"] = "float32",
    step: int | None = None,
    adapter: str | Path | None = None,
) -> Decoder:
    """Return the model at `path` with float32 parameters, computing in `dtype`: a Hugging Face
    directory, a .gguf file, `package:NAME`, or the work directory of a run.

    The model of a run is that of its checkpoint after `step` steps (None: the newest valid one),
    with the masks of that step in its branches: `nnx.state(model, Mask)`. After a dense rung all
    masks are None. A run with `lora` has its adapters in place (`compress.merge_factors` merges
    them). `adapter`: an adapter directory of PEFT, for a model without adapters. Raises `UserError`
    for a `step` of a model that is not a run, and for an adapter of another base model.
    """
    model = _load_model(path, dtype, step)
    return model if adapter is None else load_adapter(model, adapter)


def _load_model(
    path: str | Path, dtype: Literal["float32", "bfloat16"], step: int | None
) -> Decoder:
    directory = interop.locate(path)
    if not is_run(directory):
        if step is not None:
            raise UserError(f"step {step} needs the work directory of a run; {path} is not one")
        return interop.load_model(path, dtype)
    run = _open(WorkDir(directory), step)
    layout, layers = run.layout(Compute(dtype=dtype)), run.checkpoint.meta["segment_layers"]
    kept: Kept = tuple({} for _ in layers)
    names = [name for name in run.checkpoint.leaves if name.startswith("kept/")]
    for name, indices in run.checkpoint.read(names).items():
        _, segment, unit = name.split("/")
        kept[int(segment)][unit] = jnp.asarray(indices)
    values = {path: jnp.asarray(run.read(path)) for path in layout.leaves}
    return layout.bind(values, as_floats(unit_masks(layout, layers, kept)))


def starting_point(config: Config) -> tuple[DecoderConfig, Weights | None]:
    """Return the model that is trained, and its pretrained weights if it has any."""
    weights = None
    if config.model.path is not None:
        weights = open_weights(config.model.path)
        where, adapter = f"model.path {config.model.path}", config.model.adapter
        if config.lora.rank == 0:
            weights.check_not_quantized(f"{where} with lora.rank 0")
        weights.check_packing(where)
        if adapter is not None:
            weights.check_not_quantized(f"{where} with model.adapter")
            weights = adapted_weights(weights, adapter)
        model = weights.config
    else:
        assert config.model.preset is not None
        model = resized(preset(config.model.preset), config.model.sizes)
    if config.model.rope_type is not None:
        model = extended(model, config.model.rope_type, config.model.rope_factor)
    return model, weights


def generation_settings(config: Config, pretrained: Weights | None) -> Json:
    """Return the generation_config.json of the pretrained model, if the run uses its tokenizer.

    Its token ids mean something else with another tokenizer.
    """
    return pretrained.generation if pretrained and config.data.tokenizer == "model" else {}


def exported(model: DecoderConfig, tokenizer: Tokenizer, form: DataFormat) -> DecoderConfig:
    """Return the config for export. Its end-of-sequence tokens include those that end answers in
    the training data, so that other programs stop there."""
    ends = [] if form.is_text else end_of_turn(tokenizer)
    added = [end for end in ends if isinstance(end, int) and end not in model.eos_token_ids]
    return replace(model, eos_token_ids=(*model.eos_token_ids, *added))
