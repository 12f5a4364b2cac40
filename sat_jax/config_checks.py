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
    _check_forward(config)
    _check_compensate(config)
    _check_schedule(config)
    if sparse.refresh_every == 0:
        _check_live(config)


def _check_live(config: "Config") -> None:
    """Layers that select from the batch at hand see inputs only, once a step."""
    sparse = config.sparsity
    if not METRICS[sparse.metric].foresees:
        accepted = ", ".join(name for name, metric in METRICS.items() if metric.foresees)
        raise UserError(
            "sparsity.refresh_every 0 selects before neurons give the outputs that"
            f" sparsity.metric {sparse.metric!r} needs; accepted: the metrics {accepted}, or"
            " refresh_every 1 or more"
        )
    if config.train.accumulate > 1:
        raise UserError(
            "sparsity.refresh_every 0 selects from each batch, and the microbatches of"
            f" train.accumulate {config.train.accumulate} share one selection; accepted:"
            " train.accumulate 1, or refresh_every 1 or more"
        )
    for name in ("probe_tokens", "probe_sampling", "stats_decay"):
        default = getattr(type(sparse), name)
        if getattr(sparse, name) != default:
            raise UserError(
                f"sparsity.{name} {getattr(sparse, name)!r} has no place where"
                " sparsity.refresh_every is 0 and each layer sees the whole batch; accepted:"
                f" {default!r}"
            )


def _check_forward(config: "Config") -> None:
    """Layers that select in the forward pass have to omit something there."""
    sparse = config.sparsity
    if sparse.forward == "all" and sparse.refresh_every == 0:
        raise UserError(
            "sparsity.refresh_every 0 is for forward passes that omit neurons, and"
            " sparsity.forward is 'all'; accepted: 'kept', or another sparsity.refresh_every"
        )


def _check_compensate(config: "Config") -> None:
    """Compensation needs a selection by probes and weights that are computed with as they are."""
    sparse = config.sparsity
    if not sparse.compensate:
        return
    others = (("forward", "all"), ("execution", "kernel"), ("refresh_every", 0))
    for name, meaningless in others:
        if getattr(sparse, name) == meaningless:
            raise UserError(
                "sparsity.compensate adds to the kept rows of output matrices what probes tell of"
                f" the omitted ones, for which sparsity.{name} {meaningless!r} leaves no place;"
                f" accepted: compensate False, or another sparsity.{name}"
            )
    if not METRICS[sparse.metric].probes:
        accepted = ", ".join(name for name, metric in METRICS.items() if metric.probes)
        raise UserError(
            "sparsity.compensate needs outputs, which probes see, and sparsity.metric"
            f" {sparse.metric!r} has none at every refresh; accepted: the metrics {accepted}"
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
