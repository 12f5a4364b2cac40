"""Set-up of a run from its settings: model, data, mesh and schedule."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from sat_jax.cache import cache_dir
from sat_jax.compress.adapters import check_expressible
from sat_jax.compress.lora import add_lora, base_layout, lora_layout
from sat_jax.compress.packed import base_method, check_groups, quantized_reader
from sat_jax.config import Config, MeshConfig
from sat_jax.data.batches import in_order, open_split
from sat_jax.data.conversations import training_tokenizer
from sat_jax.data.data_format import DataFormat
from sat_jax.data.prepare import Prepared, prepare
from sat_jax.data.tokenizer import Tokenizer, load_tokenizer
from sat_jax.errors import UserError
from sat_jax.interop import Weights, locate
from sat_jax.interop.huggingface import check_exportable
from sat_jax.models.build import initial_values, layout_of
from sat_jax.models.decoder_config import DecoderConfig
from sat_jax.nn.attention.dot_product import refusals
from sat_jax.nn.attention.grouped_query import Attention
from sat_jax.nn.decoder import Decoder
from sat_jax.nn.hidden_distillation import PROJECTION, new_projections
from sat_jax.nn.layout import Layout, flat_arrays, weight_reader
from sat_jax.nn.quantized import Packing
from sat_jax.nn.retention import Retention
from sat_jax.parallel.mesh import make_mesh
from sat_jax.parallel.processes import check_processes, on_host
from sat_jax.parallel.rules import check_divisible, place, tree_shardings
from sat_jax.sparsity.controller import Controller, make_controller
from sat_jax.sparsity.execution.sparse_base import dense_count
from sat_jax.sparsity.plan import neurons_of
from sat_jax.sparsity.predictors import add_predictors
from sat_jax.sparsity.stored_blocks import block_grids, block_layout
from sat_jax.train.layouts import (
    Teacher,
    base_packing,
    projection_shape,
    run_layout,
    teacher_layout,
    trained_layout,
    trained_quantization,
)
from sat_jax.train.run_weights import starting_point
from sat_jax.train.stored_teacher import StoredTokens, stored_tokens
from sat_jax.train.teacher import (
    check_tokenizers,
    open_teacher,
    read_teacher,
)

_PROJECTIONS = 6  # the purpose of a random key: what it is folded with after the seed


@dataclasses.dataclass(frozen=True)
class Task:
    """The resolved configuration, model, data, mesh and schedule of a run."""

    config: Config
    model: DecoderConfig
    weights: Weights | None
    tokenizer: Tokenizer
    data: Prepared
    mesh: Mesh
    controller: Controller
    teacher: Teacher | None = None
    top_tokens: StoredTokens | None = None  # of the teacher, which then has no parameters here

    @property
    def stored(self) -> Packing | None:
        """How the matrices of `model.path` are quantized; None: they are not."""
        return None if self.weights is None else self.weights.packing

    @property
    def layout(self) -> Layout[Decoder]:
        """The layout of the arrays that the run trains or keeps frozen."""
        return run_layout(self.config, self.model, stored=self.stored)

    @property
    def teacher_model(self) -> DecoderConfig | None:
        """The model of the teacher; None without distillation."""
        return None if self.teacher is None else self.teacher.model


def set_up(config: Config, log: Callable[[str], None]) -> Task:
    """Check all settings before compilation, and prepare the data.

    Raises `UserError` for settings that the model, devices or data do not allow.
    """
    jax.config.update("jax_compilation_cache_dir", str(cache_dir("xla")))
    # Reading a program takes a twentieth of the CPU time of compiling it.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    check_processes()
    mesh = make_mesh(config.mesh)
    model, weights = starting_point(config)
    _check_rows(config, mesh)
    _check_attention(config, model)
    _check_retention(config, model, mesh)
    if config.export.huggingface:
        check_exportable(model)
        if config.lora.rank:
            check_expressible(model, config.lora)
    _check_lengths(config, model)
    if config.sparsity.adapters == "dense" and config.rates[0] > 0 and _retentions(model):
        raise UserError(
            "sparsity.adapters 'dense': the norm of each head of retention would amplify adapters"
            " of omitted heads; accepted: sparse, or sparsity.rate_attention 0"
        )
    stored = None if weights is None else weights.packing
    _check_quantized(config, model, stored)
    controller = controller_of(config, model)
    layout = run_layout(config, model, stored=stored)
    for rung in controller.rungs:
        check_divisible(mesh, block_layout(layout, rung.plan.stored))
    if max(config.rates) > 0 and not controller.sparse:
        log("sparsity: these rates omit nothing in this model; the run is dense")
    teacher_weights = _checked_teacher(config, model, mesh, log)
    if teacher_weights is not None:
        projection_shape(config, model, teacher_weights.config)  # raises for layers it has not
    tokenizer, data = prepared_data(config, model, log)
    if controller.sparse and config.sparsity.dense_answers > 0:
        _check_answers(config, data)
    teacher, top_tokens = None, None
    if teacher_weights is not None and config.distill.topk is not None:
        top_tokens = stored_tokens(config, data, teacher_weights, mesh, log)
        teacher = Teacher(
            teacher_weights.config, teacher_layout(config, teacher_weights.config), {}
        )
    elif teacher_weights is not None:
        teacher = read_teacher(config, teacher_weights, mesh)
    return Task(config, model, weights, tokenizer, data, mesh, controller, teacher, top_tokens)


def _checked_teacher(
    config: Config, model: DecoderConfig, mesh: Mesh, log: Callable[[str], None]
) -> Weights | None:
    """Return the weights of a teacher that fits model, data and mesh; None without distillation."""
    if not config.distills:
        return None
    tokenizer = _tokenizer(config, model)
    try:
        weights = open_teacher(config)
        teacher = weights.config
        if teacher.vocab_size != model.vocab_size:
            raise UserError(
                f"it has {teacher.vocab_size} tokens, and the trained model {model.vocab_size};"
                " accepted: equal vocabularies"
            )
        check_tokenizers(config, teacher, tokenizer, log)
        _check_lengths(config, teacher)
        _check_context(config, teacher)
        check_divisible(mesh, teacher_layout(config, teacher))
    except UserError as error:
        raise UserError(f"distill.teacher {config.distill.teacher}: {error}") from error
    return weights


def controller_of(config: Config, model: DecoderConfig) -> Controller:
    """Return the controller of a run. Raises `UserError` for rungs that its mesh cannot train."""
    layout, weights, grids = layout_of(model), config.sparsity.weights, {}
    _check_stages(config.mesh, layout.layers)
    if config.stores_blocks:
        grids = block_grids(layout, weights.matrices, weights.block)
    controller = make_controller(
        config.sparsity,
        neurons_of(layout),
        config.train.steps,
        config.layer_rates,
        config.sparsity.balance or config.mesh.tensor,
        config.mesh.rounds,
        grids,
    )
    _check_skipping(config, layout)
    _check_counts(config, controller)
    exchanges = map(controller.exchanges, range(config.train.steps))
    if config.stores_blocks and weights.update == "rigl" and not any(exchanges):
        raise UserError(
            f"sparsity.weights.update_every {weights.update_every} leaves no exchange of blocks;"
            " accepted: fewer steps than a rung with block-sparse matrices has"
        )
    return controller


def prepared_data(
    config: Config, model: DecoderConfig, log: Callable[[str], None]
) -> tuple[Tokenizer, Prepared]:
    """Return the tokenizer and the data of a run, prepared if necessary. Starts no backend."""
    data_format = DataFormat.from_settings(config.data)
    tokenizer = _tokenizer(config, model)
    data = prepare(
        sources=config.data.sources,
        tokenizer=tokenizer,
        row_length=config.data.row_length,
        held_out=config.data.held_out,
        max_tokens=config.data.max_tokens,
        data_format=data_format,
        log=log,
    )
    return training_tokenizer(tokenizer, data_format), data


def _tokenizer(config: Config, model: DecoderConfig) -> Tokenizer:
    path = None if config.model.path is None else locate(config.model.path)
    return load_tokenizer(config.data.tokenizer, path, model.vocab_size)


def initial_params(task: Task) -> dict[str, jax.Array]:
    """Return the parameters of a run by path, initialised or read, sharded over the mesh: float32,
    but for a quantized base of adapters."""
    layout, config = layout_of(task.model), task.config
    base, projections = _initial_base(task), _initial_projections(task)
    if not config.lora.rank:
        return base | projections
    shardings = tree_shardings(task.mesh, task.layout, dict(task.layout.shapes))

    def add(values: dict[str, Any]) -> dict[str, Any]:
        adapted = add_lora(layout, values, config.lora, config.seed)
        if not config.has_predictors:
            return adapted
        rank = config.sparsity.predictor_rank
        return add_predictors(lora_layout(layout, config.lora), adapted, rank)

    params: dict[str, jax.Array] = jax.jit(add, out_shardings=shardings, donate_argnums=0)(base)
    return params | projections


def _initial_base(task: Task) -> dict[str, Any]:
    """Return the parameters by path, without adapters: arrays and quantized weights."""
    plain, packing = layout_of(task.model), base_packing(task.config.lora, task.stored)
    read: Callable[[str], Any]
    if task.weights is not None:
        read = task.weights.stored or task.weights.read
    else:
        shardings = tree_shardings(task.mesh, plain, dict(plain.shapes))
        initial = functools.partial(initial_values, task.model, task.config.seed)
        params = jax.jit(initial, out_shardings=shardings)()
        if packing is None:
            return params
        read = on_host(params)
    method = base_method(task.config.lora.base, task.config.lora.group)
    if method is not None:
        read = quantized_reader(read, plain, method)
    layout = base_layout(plain, packing)
    shardings = tree_shardings(task.mesh, layout, dict(layout.shapes))
    arrays: dict[str, jax.Array] = {}
    for path in plain.leaves:
        for name, array in flat_arrays((path,), read(path)).items():
            value = np.asarray(array, layout.shapes[name].dtype)
            arrays[name] = place(value, shardings[name])
    weight = weight_reader(arrays.__getitem__, layout)
    return {path: weight(path) for path in plain.leaves}


def _check_quantized(config: Config, model: DecoderConfig, stored: Packing | None) -> None:
    """Check that matrices can be quantized, or are, and what is trained with them."""
    lora, path = config.lora, config.model.path
    if lora.base is not None and stored is not None:
        raise UserError(
            f"lora.base {lora.base}: model.path {path} is quantized already ({stored.format});"
            " accepted: None"
        )
    for method, setting in (
        (base_method(lora.base, lora.group), "lora.group"),
        (trained_quantization(config), "quantization.group"),
    ):
        if method is not None:
            check_groups(layout_of(model), method, setting)
    packing = base_packing(lora, stored)
    if packing is not None and max(config.rates) > 0:
        raise UserError(
            f"sparsity.rate {max(config.rates):g} excludes a base that is quantized"
            f" ({packing.format}): weights of several units share a scale; accepted: 0"
        )


def _initial_projections(task: Task) -> dict[str, jax.Array]:
    """Return the projections of hidden states by path, if the run trains any."""
    shape = projection_shape(task.config, task.model, task.teacher_model)
    if shape is None:
        return {}
    layout = trained_layout(task.config, task.model, task.teacher_model, stored=task.stored)
    shardings = tree_shardings(task.mesh, layout, {PROJECTION: layout.shapes[PROJECTION]})
    key = jax.random.fold_in(jax.random.key(task.config.seed), _PROJECTIONS)
    new = jax.jit(lambda: {PROJECTION: new_projections(shape, key)}, out_shardings=shardings)
    projections: dict[str, jax.Array] = new()
    return projections


def _check_attention(config: Config, model: DecoderConfig) -> None:
    if config.model.attention is None:
        return
    layout = layout_of(model)
    queries = [
        layout.shapes[f"layers/{name}/query"]
        for name, branch in layout.branches.items()
        if isinstance(branch, Attention)
    ]
    if not queries:
        raise UserError(
            f"model.attention={config.model.attention}: a {model.family} model has no attention;"
            " accepted: None"
        )
    rows = config.train.rows_per_step // config.train.accumulate
    heads = queries[0].shape[1:-1]
    q = jax.ShapeDtypeStruct((rows, config.data.row_length, *heads), config.model.dtype)
    reasons = refusals(q, config.mesh.context)
    if reason := reasons[config.model.attention]:
        accepted = ", ".join(name for name, reason in reasons.items() if reason is None)
        raise UserError(f"model.attention={config.model.attention}: {reason}; accepted: {accepted}")


def _check_lengths(config: Config, model: DecoderConfig) -> None:
    length = config.data.pose_length
    model.check_length("data.row_length", config.data.row_length)
    if length is None:
        return
    if model.rope is None:
        raise UserError(
            f"data.pose_length {length}: a {model.family} model has no rotary positions; accepted:"
            " None"
        )
    model.check_length("data.pose_length", length)


def _retentions(model: DecoderConfig) -> list[Retention]:
    return [b for b in layout_of(model).branches.values() if isinstance(b, Retention)]


def _check_context(config: Config, model: DecoderConfig) -> None:
    context = config.mesh.context
    if context > 1 and _retentions(model):
        raise UserError(
            f"mesh.context {context}: the state of retention passes from token to token of a row;"
            " accepted: 1"
        )


def _check_retention(config: Config, model: DecoderConfig, mesh: Mesh) -> None:
    name, branches = config.model.retention, _retentions(model)
    _check_context(config, model)
    if name == "xla":
        return
    if not branches:
        reason: str | None = f"a {model.family} model has no retention"
    elif mesh.size > 1:
        reason = f"{mesh.size} devices, and the kernel runs on one"
    else:
        reason = branches[0].refusal(name, config.model.dtype, mesh.devices.flat[0])
    if reason:
        raise UserError(f"model.retention={name}: {reason}; accepted: xla")


def _check_answers(config: Config, data: Prepared) -> None:
    """Require that no training row has more tokens that bear loss than may have all neurons."""
    share, length = config.sparsity.dense_answers, config.data.row_length
    batches = in_order(open_split(data, "train"), 64)
    most = max(int(batch.loss_mask.sum(axis=1).max()) for batch in batches)
    if most > dense_count(share, length):
        raise UserError(
            f"sparsity.dense_answers {share:g}: {most} of the {length} tokens of a training row"
            f" bear loss; accepted: {math.ceil(100 * most / length) / 100:g} or more, or 0"
        )


def _check_skipping(config: Config, layout: Layout[Any]) -> None:
    rate = config.sparsity.token_skip_rate
    if rate > 0 and any(isinstance(branch, Retention) for branch in layout.branches.values()):
        raise UserError(
            f"sparsity.token_skip_rate {rate:g}: retention decays from each token of a row to the"
            " next one, so that no token can be left out; accepted: 0"
        )


def _check_stages(mesh: MeshConfig, layers: int) -> None:
    """Require that stages, of which each device has equally many, have equally many layers."""
    stages = mesh.pipeline * mesh.rounds
    if layers % stages:
        raise UserError(
            f"mesh.pipeline {mesh.pipeline} × mesh.rounds {mesh.rounds} = {stages} stages do not"
            f" divide the {layers} layers of the model; accepted: divisors of {layers}"
        )


def _check_counts(config: Config, controller: Controller) -> None:
    """Require that gathered layers, of which stages have equally many, have equal counts."""
    stages = config.mesh.pipeline
    if stages == 1 or config.sparsity.execution == "mask":
        return
    for rung in controller.rungs:
        segments = rung.plan.segments
        if len({segment.counts for segment in segments}) > 1:
            runs = ", ".join(f"{segment.start} to {segment.stop - 1}" for segment in segments)
            raise UserError(
                f"mesh.pipeline {stages}: layers {runs} keep different numbers of neurons;"
                " accepted: one rate for all layers and no sparsity.dense_layers, or"
                " sparsity.execution mask"
            )


def _check_rows(config: Config, mesh: Mesh) -> None:
    rows = config.train.rows_per_step // config.train.accumulate
    parts = mesh.shape["data"] * mesh.shape["fsdp"]
    if rows % parts:
        raise UserError(
            f"train.rows_per_step / train.accumulate = {rows} is not a multiple of"
            f" mesh.data × mesh.fsdp = {parts}"
        )
