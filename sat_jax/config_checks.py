"""Checks of combinations of settings, before any data or model is read."""

import dataclasses
import operator
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from sat_jax.errors import UserError
from sat_jax.nn.hidden_distillation import HiddenSettings
from sat_jax.sparsity.importance import METRICS, Metric

if TYPE_CHECKING:
    from sat_jax.config import Config
    from sat_jax.config_sparsity import SparsityConfig

# (setting, the setting that it requires if it is not at its default, the required value)
_NEEDS = (
    ("optimizer.decay_share", "optimizer.schedule", "wsd"),
    ("optimizer.moments", "sparsity.execution", "mask"),
    ("sparsity.min_gain", "sparsity.schedule", "auto"),
    ("sparsity.adapters", "sparsity.refresh_every", 0),
    ("sparsity.predictor_rank", "sparsity.adapters", "dense"),
    ("sparsity.dense_answers", "sparsity.adapters", "dense"),
    ("sparsity.weights.update_every", "sparsity.weights.update", "rigl"),
    ("sparsity.weights.drop_fraction", "sparsity.weights.update", "rigl"),
)
# (setting of sparsity, its value, excluded setting, excluded value, reason)
_EXCLUDES: tuple[tuple[str, Any, str, Any, str], ...] = (
    *(
        ("least_squares_correction", True, "passes", passes, "dense passes need no correction")
        for passes in ("backward", "weights")
    ),
    ("least_squares_correction", True, "execution", "kernel", "kernels use the full weights"),
    ("least_squares_correction", True, "refresh_every", 0, "refreshes compute corrections"),
    ("refresh_every", 0, "execution", "kernel", "kernels need kept units before the step"),
    ("passes", "weights", "execution", "kernel", "kernels compute kept units alone"),
)
# Settings of sparsity that have a meaning for omitted units alone.
_OF_UNITS = (
    *("execution", "attention_unit", "dense_layers", "block", "passes"),
    "least_squares_correction",
)
# Settings of sparsity with adapters, and the values that are implemented.
_WITH_LORA: dict[str, tuple[Any, ...]] = {
    "execution": ("gather", "mask"),
    "least_squares_correction": (False,),
    "passes": ("all",),
    "branch_rate": (0.0,),
    "token_rate": (0.0,),
}


def check_together(config: "Config") -> None:
    """Raise `UserError` for the first combination of settings that is not possible."""
    if config.model.preset is None and config.model.path is None:
        raise UserError("model: set preset to a name or path to pretrained weights")
    if config.model.path is not None and (sizes := config.model.sizes):
        raise UserError(
            f"model.{next(iter(sizes))} changes the shape of a preset, and model.path"
            f" {config.model.path!r} has its own; accepted: one of the two"
        )
    if config.model.adapter is not None and config.model.path is None:
        raise UserError(
            f"model.adapter {config.model.adapter!r} needs model.path, the model that it was"
            " trained on"
        )
    length, row = config.data.pose_length, config.data.row_length
    if config.mesh.data == 0:
        raise UserError("mesh.data is 0; accepted: 1 or more, or -1 for all remaining devices")
    if row % config.mesh.context:
        raise UserError(
            f"data.row_length {row} is not a multiple of mesh.context {config.mesh.context}"
        )
    if config.model.rope_factor > 1 and config.model.rope_type is None:
        raise UserError(f"model.rope_factor {config.model.rope_factor:g} needs model.rope_type")
    if length is not None and length < row:
        raise UserError(f"data.pose_length {length} is below data.row_length {row}")
    _check_steps(config)
    _check_pipeline(config)
    _check_weights(config)
    _check_lora(config)
    _check_quantization(config)
    _check_distill(config)
    for path, needed, wanted in _NEEDS:
        group, _, name = path.rpartition(".")
        settings, current = (operator.attrgetter(p)(config) for p in (group, needed))
        value = getattr(settings, name)
        if value != getattr(type(settings), name) and current != wanted:
            raise UserError(f"{path} {value!r} needs {needed} {wanted!r}, not {current!r}")
    sparse, tensor = config.sparsity, config.mesh.tensor
    if sparse.execution == "kernel" and sparse.block % 64:
        raise UserError(
            f"sparsity.execution 'kernel' with sparsity.block {sparse.block}; accepted: multiples"
            " of 64"
        )
    if sparse.balance is not None and sparse.balance % tensor:
        raise UserError(
            f"sparsity.balance is {sparse.balance}; accepted: multiples of mesh.tensor {tensor},"
            " or None"
        )
    if max(config.rates) > 0:
        _check_selection(config)
    _check_backward(config)
    if config.omitted_share > 0:
        _check_schedule(config)


def _check_backward(config: "Config") -> None:
    """Check what the backward passes of branches, and tokens of weight gradients and of layers, can
    be left out with."""
    sparse, optimizer = config.sparsity, config.optimizer
    if sparse.branch_rate == ():
        raise UserError("sparsity.branch_rate has no value; accepted: one, or one for each layer")
    # (path, value, whether it is refused, accepted)
    both: Any = (
        ("sparsity.execution", sparse.execution, sparse.execution == "kernel", "gather or mask"),
        ("sparsity.weights.density", sparse.weights.density, config.stores_blocks, "1"),
        ("mesh.pipeline", config.mesh.pipeline, config.mesh.pipeline > 1, "1"),
    )
    moments = ("optimizer.moments", optimizer.moments, optimizer.moments == "decay", "freeze")
    omits = max(config.rates) > 0
    in_layers = omits and sparse.refresh_every == 0
    tokens: Any = (
        ("sparsity.passes", sparse.passes, sparse.passes == "weights", "all or backward"),
        ("sparsity.refresh_every", 0, in_layers, "1 or more"),
    )
    observes = omits and METRICS[sparse.metric].needs == ("inputs",)
    accepted = _metrics(sparse, lambda metric: metric.needs != ("inputs",))
    skipping: Any = (
        ("sparsity.execution", sparse.execution, sparse.execution != "gather", "gather"),
        *both[1:],
        ("mesh.context", config.mesh.context, config.mesh.context > 1, "1"),
        tokens[1],
        ("sparsity.metric", sparse.metric, observes, accepted),
        ("sparsity.token_rate", sparse.token_rate, sparse.token_rate > 0, "0"),
    )
    for name, rate, excluded in (
        ("branch_rate", config.branch_rate, (*both, moments)),
        ("token_rate", sparse.token_rate, (*both, *tokens)),
        ("token_skip_rate", sparse.token_skip_rate, skipping),
    ):
        for path, value, refused, accepted in excluded if rate > 0 else ():
            if refused:
                raise UserError(
                    f"sparsity.{name} {getattr(sparse, name)} excludes {path} {value}; accepted:"
                    f" {accepted}"
                )


def _check_weights(config: "Config") -> None:
    """Check settings of block-sparse matrices, and of the kernels that they use."""
    sparse, kernels = config.sparsity, config.model.kernels
    if kernels is not None and sparse.execution != "kernel" and not config.stores_blocks:
        raise UserError(
            f"model.kernels {kernels!r} needs sparsity.execution 'kernel', not"
            f" {sparse.execution!r}, or sparsity.weights.density below 1"
        )
    if not config.stores_blocks:
        return
    if max(config.rates) > 0:
        raise UserError(
            f"sparsity.weights.density {sparse.weights.density:g} excludes omission rates above 0"
            f" ({max(config.rates):g}): units are rows of dense matrices; accepted: one of the two"
        )
    for name in _OF_UNITS:
        value, default = getattr(sparse, name), getattr(type(sparse), name)
        if value != default:
            raise UserError(
                f"sparsity.weights.density {sparse.weights.density:g} excludes sparsity.{name}"
                f" {value!r}, a setting of omitted units; accepted: {default!r}"
            )


def _check_lora(config: "Config") -> None:
    """Check settings of adapters, and of omitted units beside them."""
    lora, sparse = config.lora, config.sparsity
    for field in dataclasses.fields(lora):
        value = getattr(lora, field.name)
        if lora.rank == 0 and value != field.default:
            raise UserError(f"lora.{field.name} {value!r} needs lora.rank 1 or more, not 0")
    if lora.rank == 0 and sparse.adapters == "dense":
        raise UserError("sparsity.adapters 'dense' needs lora.rank 1 or more, not 0")
    if lora.rank == 0:
        return
    if lora.base is None and lora.group != type(lora).group:
        raise UserError(f"lora.group {lora.group} needs lora.base")
    if sparse.adapters == "dense":
        _check_sparse_base(config)
    if config.stores_blocks:
        raise UserError(
            f"lora.rank {lora.rank} excludes sparsity.weights.density {sparse.weights.density:g}:"
            " adapters have dense bases; accepted: one of the two"
        )
    if config.omitted_share == 0:
        return
    if lora.dora:
        raise UserError(
            f"lora.dora excludes omission rates above 0 ({config.omitted_share:g}): norms of"
            " outputs need all units; accepted: one of the two"
        )
    for name, accepted in _WITH_LORA.items():
        value = getattr(sparse, name)
        if value not in accepted:
            raise UserError(
                f"lora.rank {lora.rank} excludes sparsity.{name} {value!r}; accepted:"
                f" {' or '.join(map(repr, accepted))}"
            )


def _check_quantization(config: "Config") -> None:
    """Check settings of quantization in the forward pass, and what else changes matrices."""
    bits, group = config.quantization.bits, config.quantization.group
    if bits is None:
        if group != type(config.quantization).group:
            raise UserError(f"quantization.group {group} needs quantization.bits")
        return
    if config.lora.rank > 0:
        raise UserError(
            f"quantization.bits {bits} excludes lora.rank {config.lora.rank}: matrices with"
            " adapters are frozen, and lora.base quantizes them; accepted: one of the two"
        )
    if config.omitted_share > 0:
        raise UserError(
            f"quantization.bits {bits} excludes rates of sparsity above 0, and"
            f" sparsity.weights.density below 1 ({config.omitted_share:g} is omitted): groups of"
            " weights have scales of all their weights; accepted: one of the two"
        )


def _check_sparse_base(config: "Config") -> None:
    """Check settings of frozen weights that omit neurons alone."""
    sparse, default = config.sparsity, type(config.sparsity).predictor_rank
    predicts = METRICS[sparse.metric].predicts
    if sparse.predictor_rank != default and not predicts:
        names = ", ".join(name for name, metric in METRICS.items() if metric.predicts)
        raise UserError(
            f"sparsity.metric {sparse.metric!r} does not use sparsity.predictor_rank"
            f" {sparse.predictor_rank}; accepted: {default}, or metric {names}"
        )
    if sparse.dense_answers > 0 and config.mesh.context > 1:
        raise UserError(
            f"sparsity.dense_answers {sparse.dense_answers:g} excludes mesh.context"
            f" {config.mesh.context}: devices would have different numbers of these tokens;"
            " accepted: 1"
        )
    if config.optimizer.moments != "freeze":
        raise UserError(
            f"sparsity.adapters 'dense' excludes optimizer.moments {config.optimizer.moments!r}:"
            " adapters of omitted neurons are updated, too; accepted: freeze"
        )


def _check_distill(config: "Config") -> None:
    """Require a teacher for all other settings of distillation."""
    for field in dataclasses.fields(config.distill):
        value = getattr(config.distill, field.name)
        if config.distill.teacher is None and value != field.default:
            raise UserError(f"distill.{field.name} {value!r} needs distill.teacher")
    distill = config.distill
    for field in dataclasses.fields(HiddenSettings):
        value = getattr(distill, field.name)
        if distill.hidden_weight == 0 and value != field.default:
            raise UserError(f"distill.{field.name} {value!r} needs distill.hidden_weight above 0")
    if distill.topk is not None:
        for name, reason, excluded in (
            ("distill.weight", "the teacher is not used", distill.weight == 0),
            ("distill.hidden_weight", "hidden states are not stored", distill.hidden_weight > 0),
            ("data.pose_length", "positions change", config.data.pose_length is not None),
        ):
            if excluded:
                value = operator.attrgetter(name)(config)
                raise UserError(f"distill.topk {distill.topk} excludes {name} {value!r}: {reason}")
    if distill.hidden_weight > 0 and distill.weight == 0:
        raise UserError("distill.hidden_weight needs distill.weight above 0, not 0")
    if distill.hidden_weight > 0 and config.mesh.pipeline > 1:
        raise UserError(
            f"distill.hidden_weight excludes mesh.pipeline {config.mesh.pipeline}: stages do not"
            " return hidden states; accepted: 1"
        )


def _check_steps(config: "Config") -> None:
    train, warmup = config.train, config.optimizer.warmup_steps
    if train.rows_per_step % train.accumulate:
        raise UserError(
            f"train.rows_per_step {train.rows_per_step} is not a multiple of train.accumulate"
            f" {train.accumulate}"
        )
    if warmup > train.steps:
        raise UserError(f"optimizer.warmup_steps {warmup} is more than train.steps {train.steps}")


def _check_pipeline(config: "Config") -> None:
    stages, accumulate = config.mesh.pipeline, config.train.accumulate
    if accumulate % stages:
        raise UserError(
            f"train.accumulate {accumulate} is the number of microbatches of mesh.pipeline"
            f" {stages}; accepted: multiples of {stages}"
        )
    sparse, rounds = config.sparsity, config.mesh.rounds
    if rounds > 1 and stages == 1:
        raise UserError(f"mesh.rounds {rounds} needs mesh.pipeline 2 or more, not 1")
    if rounds > 1 and sparse.execution == "mask":
        raise UserError(
            f"sparsity.execution 'mask' excludes mesh.rounds {rounds}: masked layers are not split"
            " into rounds; accepted: gather, or mesh.rounds 1"
        )
    if stages == 1 or max(config.rates) == 0:
        return
    if sparse.refresh_every == 0:
        raise UserError(
            f"sparsity.refresh_every 0 excludes mesh.pipeline {stages}: all microbatches share one"
            " selection; accepted: refresh_every 1 or more"
        )
    if METRICS[sparse.metric].needs == ("inputs",):
        accepted = _metrics(sparse, lambda metric: metric.needs != ("inputs",))
        raise UserError(
            f"sparsity.metric {sparse.metric!r} excludes mesh.pipeline {stages}: stages do not"
            f" observe the inputs of training steps; accepted: {accepted}"
        )


def _metrics(sparse: "SparsityConfig", accepts: Callable[[Metric], bool]) -> str:
    """Return the names of metrics that are accepted, and have a meaning with the passes."""
    dense_forward = sparse.passes != "all"
    names = (
        n for n, m in METRICS.items() if accepts(m) and (dense_forward or not m.measures_updates)
    )
    return ", ".join(names)


def _check_selection(config: "Config") -> None:
    """Check settings of per-batch selection and of the least-squares correction."""
    sparse, accumulate = config.sparsity, config.train.accumulate
    for name, value, excluded, current, reason in _EXCLUDES:
        if getattr(sparse, name) == value and getattr(sparse, excluded) == current:
            raise UserError(
                f"sparsity.{name} {value!r} excludes sparsity.{excluded} {current!r}: {reason}"
            )
    for name in ("probe_tokens", "stats_decay", "passes"):
        value, default = getattr(sparse, name), getattr(type(sparse), name)
        if sparse.refresh_every == 0 and value != default:
            raise UserError(
                f"sparsity.refresh_every 0 does not use sparsity.{name} {value!r}; accepted:"
                f" {default!r}"
            )
    metric = METRICS[sparse.metric]
    if metric.measures_updates and sparse.passes == "all":
        accepted = _metrics(sparse, lambda _: True)
        raise UserError(
            f"sparsity.metric {sparse.metric!r} excludes sparsity.passes 'all': it measures the"
            " updates of neurons, not what their omission does to the forward pass; accepted:"
            f" passes backward or weights, or metric {accepted}"
        )
    if sparse.refresh_every == 0 and accumulate > 1:
        raise UserError(
            f"sparsity.refresh_every 0 excludes train.accumulate {accumulate}: all microbatches"
            " share one selection; accepted: train.accumulate 1"
        )
    if sparse.refresh_every == 0 and not metric.needs_inputs_only:
        accepted = _metrics(sparse, lambda metric: metric.needs_inputs_only)
        raise UserError(
            f"sparsity.refresh_every 0 excludes sparsity.metric {sparse.metric!r}, which needs"
            f" outputs; accepted: {accepted}"
        )
    if sparse.least_squares_correction and not metric.probes:
        accepted = _metrics(sparse, lambda metric: metric.probes)
        raise UserError(
            "sparsity.least_squares_correction excludes sparsity.metric"
            f" {sparse.metric!r}, which has no probe at refreshes; accepted: {accepted}"
        )


def _check_schedule(config: "Config") -> None:
    sparse = config.sparsity
    if sparse.schedule == "auto" and not config.train.eval_every:
        raise UserError(
            "sparsity.schedule 'auto' needs held-out evaluations, and train.eval_every is 0;"
            " accepted: 1 or more"
        )
    if sparse.dense_start == 1.0:
        raise UserError("sparsity.dense_start 1.0 leaves no step at r0; accepted: below 1")
    if sparse.schedule in ("ladder", "auto", "s2d"):
        _check_split(sparse)
    if sparse.schedule in ("linear", "cosine", "cubic") and sparse.rungs == 1:
        raise UserError(
            f"sparsity.rungs 1 leaves the {sparse.schedule} schedule no dense step; accepted:"
            " 2 or more"
        )


def _check_split(sparse: "SparsityConfig") -> None:
    """Require a step at r0 between dense start and split, and a dense step after the split."""
    if sparse.dense_start >= sparse.split:
        raise UserError(
            f"sparsity.dense_start {sparse.dense_start} and sparsity.split {sparse.split} leave the"
            f" {sparse.schedule} no step at r0; accepted: a dense_start below split"
        )
    if sparse.split == 1.0:
        raise UserError(
            f"sparsity.split 1.0 leaves the {sparse.schedule} no dense step; accepted: below 1"
        )
