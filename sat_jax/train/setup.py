"""From settings to everything that a run needs before its first step."""

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh, Sharding

from sat_jax.cache import cache_dir
from sat_jax.config import Config
from sat_jax.data.conversations import training_tokenizer
from sat_jax.data.data_format import DataFormat
from sat_jax.data.prepare import Prepared, prepare
from sat_jax.data.tokenizer import Tokenizer, load_tokenizer
from sat_jax.errors import UserError
from sat_jax.interop import Weights, locate
from sat_jax.models.dot_product import refusals
from sat_jax.models.llama_config import LlamaConfig
from sat_jax.models.params import initial, shapes
from sat_jax.parallel.mesh import make_mesh
from sat_jax.parallel.processes import check_joined
from sat_jax.parallel.rules import check_divisible, tree_shardings
from sat_jax.sparsity.budget import Sensitivity, allocate
from sat_jax.sparsity.budget import load as load_budget
from sat_jax.sparsity.controller import Controller, Spread, make_controller
from sat_jax.sparsity.plan import Neurons, layer_units
from sat_jax.train.trained import starting_point

_ROUND = 64


@dataclasses.dataclass(frozen=True)
class Task:
    """What is trained, on what, where, and how sparsely."""

    config: Config
    model: LlamaConfig
    weights: Weights | None
    tokenizer: Tokenizer
    data: Prepared
    mesh: Mesh
    controller: Controller


def set_up(config: Config, log: Callable[[str], None]) -> Task:
    """Checks everything that can be checked before compiling, and prepares the data.

    Raises `UserError` for settings that do not fit the model, the devices or the data.
    """
    jax.config.update("jax_compilation_cache_dir", str(cache_dir("xla")))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    check_joined()
    mesh = make_mesh(config.mesh)
    model, weights = starting_point(config)
    check_divisible(mesh, shapes(model))
    _check_rows(config, mesh)
    _check_attention(config, model)
    model.check_length("data.row_length", config.data.row_length)
    controller = controller_of(config, model)
    if max(config.rates) > 0 and not controller.sparse:
        log("sparsity: no layer omits anything at these rates; this is a dense run")
    tokenizer, data = prepared_data(config, model, log)
    if config.sparsity.dense_tokens:
        controller = controller_of(config, model, data.info.splits["train"].row_targets)
    return Task(config, model, weights, tokenizer, data, mesh, controller)


def controller_of(config: Config, model: LlamaConfig, row_targets: int | None = None) -> Controller:
    """The rungs of a run, from its settings and its model's shape.

    `row_targets`: tokens that bear loss in the row that has the most, which matters to dense
    tokens; None: not known yet, as many as a row has.
    """
    neurons = Neurons(model.n_layers, model.n_kv_heads, model.query_heads, model.d_ff)
    return make_controller(
        config.sparsity,
        neurons,
        config.train.steps,
        config.layer_rates,
        config.sparsity.balance or config.mesh.tensor,
        _capacity(config, row_targets) if config.sparsity.dense_tokens else 0,
        _spread(config, model, neurons),
    )


def _capacity(config: Config, row_targets: int | None) -> int:
    """Slots for the dense tokens of a row. Rounded up, so that not every text compiles anew."""
    length = config.data.row_length
    return length if row_targets is None else min(length, -(-row_targets // _ROUND) * _ROUND)


def prepared_data(
    config: Config, model: LlamaConfig, log: Callable[[str], None]
) -> tuple[Tokenizer, Prepared]:
    """The run's tokenizer, and its data, prepared if they are not yet. Starts no device."""
    data_format = DataFormat.from_settings(config.data)
    tokenizer = load_tokenizer(config.data.tokenizer, _model_path(config), model.vocab_size)
    data = prepare(
        sources=config.data.sources,
        tokenizer=tokenizer,
        row_length=config.data.row_length,
        held_out=config.data.held_out,
        max_tokens=config.data.max_tokens,
        data_format=data_format,
        model_vocab_size=model.vocab_size,
        log=log,
    )
    return training_tokenizer(tokenizer, data_format), data


def initial_params(task: Task) -> dict[str, jax.Array]:
    """Float32 parameters by path, made or read straight into their place on the mesh."""
    abstract = shapes(task.model)
    shardings = tree_shardings(task.mesh, abstract)
    if task.weights is None:
        make = jax.jit(lambda: initial(task.model, task.config.seed), out_shardings=shardings)
        return make()
    return {
        path: _placed(np.asarray(task.weights.read(path), np.float32), shardings[path])
        for path in abstract
    }


def _placed(value: np.ndarray, sharding: Sharding) -> jax.Array:
    return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])


def shape_of(model: LlamaConfig) -> str:
    """What a calibration names its model by, to be read in a message."""
    heads = f"{model.n_kv_heads} x {model.query_heads} heads of {model.head_dim}"
    width = f"{model.d_model} wide, {model.d_ff} channels, {model.vocab_size} ids"
    return f"{model.family}: {model.n_layers} layers, {heads}, {width}"


def spread_by(sensitivity: Sensitivity, config: Config, neurons: Neurons) -> Spread:
    """How a calibration spreads overall rates, at the settings of a run."""
    sparse = config.sparsity
    balance = sparse.balance or config.mesh.tensor
    units = layer_units(neurons, *config.rates, sparse.attention_unit, sparse.block, balance)
    return partial(allocate, sensitivity, max_segments=sparse.max_segments, units=units)


def _spread(config: Config, model: LlamaConfig, neurons: Neurons) -> Spread | None:
    if config.sparsity.budget is None:
        return None
    file = Path(config.sparsity.budget).expanduser()
    sensitivity = load_budget(file, shape_of(model), config.sparsity.metric)
    return spread_by(sensitivity, config, neurons)


def _model_path(config: Config) -> Path | None:
    return None if config.model.path is None else locate(config.model.path)


def _check_attention(config: Config, model: LlamaConfig) -> None:
    if config.model.attention is None:
        return
    rows = config.train.rows_per_step // config.train.accumulate
    heads = (model.n_kv_heads, model.query_heads, model.head_dim)
    q = jax.ShapeDtypeStruct((rows, config.data.row_length, *heads), config.model.dtype)
    reasons = refusals(q)
    if reason := reasons[config.model.attention]:
        accepted = ", ".join(name for name, reason in reasons.items() if reason is None)
        raise UserError(
            f"model.attention={config.model.attention}: {reason}; accepted here: {accepted}"
        )


def _check_rows(config: Config, mesh: Mesh) -> None:
    rows = config.train.rows_per_step // config.train.accumulate
    parts = mesh.shape["data"] * mesh.shape["fsdp"]
    if rows % parts:
        raise UserError(
            f"train.rows_per_step / train.accumulate is {rows} rows, which mesh.data × mesh.fsdp ="
            f" {parts} does not divide"
        )
