"""The model of a run: what it starts from, and what it has trained by its newest whole checkpoint,
or at a step's."""

from dataclasses import replace
from pathlib import Path
from typing import Literal

import jax.numpy as jnp
import numpy as np

from sat_jax import interop
from sat_jax.config import Config
from sat_jax.config_values import from_config_dict
from sat_jax.data.data_format import DataFormat
from sat_jax.data.end_of_turn import end_of_turn
from sat_jax.data.tokenizer import Tokenizer
from sat_jax.errors import UserError
from sat_jax.interop import Weights, open_weights
from sat_jax.models.build import build, layout_of, shapes
from sat_jax.models.decoder_config import DecoderConfig
from sat_jax.models.presets import preset
from sat_jax.nn.branch import branches
from sat_jax.nn.decoder import Compute, Decoder
from sat_jax.sparsity.execution.mask import as_floats, unit_masks
from sat_jax.sparsity.rows import Kept
from sat_jax.train.checkpoint import find
from sat_jax.train.files import read_json
from sat_jax.train.workdir import WorkDir


def is_run(path: Path) -> bool:
    """Whether `path` is the work directory of a run."""
    return WorkDir(path).checkpoints.is_dir()


def open_run(path: Path, step: int | None = None) -> tuple[Weights, Config]:
    """The parameters that the run in `path` had at `step` (None: at its newest whole checkpoint).

    One parameter is read at a time. Raises `UserError` where the checkpoint is not of the run's
    model.
    """
    workdir = WorkDir(path)
    config = from_config_dict(read_json(workdir.config))
    model, _ = starting_point(config)
    stored = find(workdir.checkpoints, step)
    for name, wanted in shapes(model).items():
        found = stored.leaves.get(f"params/{name}")
        if found is None or found.shape != wanted.shape:
            raise UserError(
                f"checkpoint {stored.path} is not of the model in {workdir.config}: {name} is"
                f" {'missing' if found is None else list(found.shape)}, not {list(wanted.shape)}"
            )

    def read(name: str) -> np.ndarray:
        return np.asarray(stored.read([f"params/{name}"])[f"params/{name}"], np.float32)

    return Weights(model, read), config


def load_model(path: str | Path, dtype: Literal["float32", "bfloat16"] = "float32") -> Decoder:
    """Return the model at `path` with float32 parameters, computing in `dtype`: a Hugging Face
    directory, a .gguf file, `package:NAME`, or the work directory of a run.

    Of a run it is the model of the newest whole checkpoint, with the masks on its branches that the
    last step trained under: `nnx.state(model, Mask)` shows them. After a dense rung all are None.
    """
    place = interop.locate(path)
    if not is_run(place):
        return interop.load_model(path, dtype)
    weights, _ = open_run(place)
    model = build(weights.config, weights.read, Compute(dtype=dtype))
    stored = find(WorkDir(place).checkpoints)
    layers = stored.meta["segment_layers"]
    names = [name for name in stored.leaves if name.startswith("kept/")]
    kept: Kept = tuple({} for _ in layers)
    for name, indices in stored.read(names).items():
        _, segment, unit = name.split("/")
        kept[int(segment)][unit] = jnp.asarray(indices)
    masks = as_floats(unit_masks(layout_of(weights.config), layers, kept))
    for branch in branches(model.layers).values():
        for unit in branch.masks.keys() & masks.keys():
            branch.masks[unit].set_value(masks[unit])
    return model


def starting_point(config: Config) -> tuple[DecoderConfig, Weights | None]:
    """The model that is trained, and its pretrained weights, opened, where it has some."""
    if config.model.path is not None:
        weights = open_weights(config.model.path)
        return weights.config, weights
    assert config.model.preset is not None
    return preset(config.model.preset), None


def exported(model: DecoderConfig, tokenizer: Tokenizer, form: DataFormat) -> DecoderConfig:
    """The config that a model trained on data of this form is written with: a token that ended its
    answers is one of its ends, behind its own, or other programs would not stop there."""
    learnt = [] if form.is_text else end_of_turn(tokenizer)
    ends = [end for end in learnt if isinstance(end, int) and end not in model.eos_token_ids]
    return replace(model, eos_token_ids=(*model.eos_token_ids, *ends))
