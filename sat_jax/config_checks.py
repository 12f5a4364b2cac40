"""Settings of SAT that do not go together, refused by name before anything is read."""

from typing import TYPE_CHECKING

from sat_jax.errors import UserError
from sat_jax.sparsity.importance import METRICS

if TYPE_CHECKING:
    from sat_jax.config import Config, SparsityConfig


def check_sparsity(config: "Config") -> None:
    """Raises `UserError` for the first pair of settings that do not go together."""
    sparse = config.sparsity
    if config.optimizer.moments == "decay" and sparse.execution != "mask":
        raise UserError(
            "optimizer.moments 'decay' is of sparsity.execution 'mask', not"
            f" {sparse.execution!r}; accepted: moments 'freeze', or execution 'mask'"
        )
    if config.model.kernels is not None and sparse.execution != "kernel":
        raise UserError(
            f"model.kernels {config.model.kernels!r} is for sparsity.execution 'kernel', not"
            f" {sparse.execution!r}"
        )
    if sparse.execution == "kernel" and sparse.block % 64:
        raise UserError(
            f"sparsity.execution 'kernel' with sparsity.block {sparse.block}; accepted: multiples"
            " of 64"
        )
    if sparse.temperature != 1 and sparse.selection != "sample":
        raise UserError(
            f"sparsity.temperature {sparse.temperature} is for sparsity.selection 'sample',"
            f" not {sparse.selection!r}"
        )
    if sparse.balance is not None and sparse.balance % config.mesh.tensor:
        raise UserError(
            f"sparsity.balance is {sparse.balance}; accepted: multiples of mesh.tensor"
            f" {config.mesh.tensor}, or None"
        )
    for module in ("attention", "mlp"):
        if getattr(sparse, f"layer_rates_{module}") and (
            getattr(sparse, f"rate_{module}") is not None
        ):
            raise UserError(
                f"sparsity.rate_{module} and sparsity.layer_rates_{module} are both given;"
                " accepted: one of them"
            )
    if sparse.rate and sparse.layer_rates_attention and sparse.layer_rates_mlp:
        raise UserError(
            f"sparsity.rate {sparse.rate} says nothing beside the rates of all layers; accepted: 0"
        )
    if max(config.rates) == 0:
        return
    _check_correction(config)
    _check_schedule(config)
    if sparse.refresh_every == 0:
        _check_dynamic_selection(config)


def _check_dynamic_selection(config: "Config") -> None:
    """Layers that select from the batch at hand observe their inputs alone, once a step."""
    sparse = config.sparsity
    if not METRICS[sparse.metric].needs_inputs_only:
        accepted = ", ".join(name for name, metric in METRICS.items() if metric.needs_inputs_only)
        raise UserError(
            "sparsity.refresh_every 0 selects before the outputs are computed that"
            f" sparsity.metric {sparse.metric!r} needs; accepted: the metrics {accepted}, or"
            " refresh_every 1 or more"
        )
    if config.train.accumulate > 1:
        raise UserError(
            "sparsity.refresh_every 0 selects from each batch, and the microbatches of"
            f" train.accumulate {config.train.accumulate} share one selection; accepted:"
            " train.accumulate 1, or refresh_every 1 or more"
        )
    for name in ("probe_tokens", "probe_sampling", "stats_decay", "dense_forward"):
        default = getattr(type(sparse), name)
        if getattr(sparse, name) != default:
            raise UserError(
                f"sparsity.{name} {getattr(sparse, name)!r} has no meaning with"
                " sparsity.refresh_every 0, where each layer selects from its own input; accepted:"
                f" {default!r}, or refresh_every 1 or more"
            )
    if sparse.execution == "kernel":
        raise UserError(
            "sparsity.execution 'kernel' needs kept units before the step, and"
            " sparsity.refresh_every is 0; accepted: 'gather', 'mask', or refresh_every 1 or more"
        )


def _check_correction(config: "Config") -> None:
    """The correction needs probes, output rows that are plain arrays, and omitted outputs."""
    sparse = config.sparsity
    if not sparse.least_squares_correction:
        return
    for name, refused in (("dense_forward", True), ("execution", "kernel"), ("refresh_every", 0)):
        if getattr(sparse, name) == refused:
            raise UserError(
                "sparsity.least_squares_correction is added to kept output weights between two"
                f" probes, which sparsity.{name} {refused!r} does not allow; accepted:"
                f" least_squares_correction False, or another sparsity.{name}"
            )
    if not METRICS[sparse.metric].probes:
        accepted = ", ".join(name for name, metric in METRICS.items() if metric.probes)
        raise UserError(
            "sparsity.least_squares_correction needs the outputs that probes observe, and"
            f" sparsity.metric {sparse.metric!r} has no probe at every refresh; accepted: the"
            f" metrics {accepted}"
        )


def _check_schedule(config: "Config") -> None:
    sparse = config.sparsity
    if sparse.schedule == "auto":
        if not config.train.eval_every:
            raise UserError(
                "sparsity.schedule 'auto' follows the held-out loss, and train.eval_every is 0;"
                " accepted: 1 or more"
            )
    elif (sparse.patience, sparse.min_gain) != (1, 0.005):
        raise UserError(
            "sparsity.patience and sparsity.min_gain are for sparsity.schedule 'auto', not"
            f" {sparse.schedule!r}"
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
    """Between the dense start and the split are the steps at r0, after the split the dense ones."""
    if sparse.dense_start >= sparse.split:
        raise UserError(
            f"sparsity.dense_start {sparse.dense_start} and sparsity.split {sparse.split} leave the"
            f" {sparse.schedule} no step at r0; accepted: a dense_start below split"
        )
    if sparse.split == 1.0:
        raise UserError(
            f"sparsity.split 1.0 leaves the {sparse.schedule} no dense step; accepted: below 1"
        )
