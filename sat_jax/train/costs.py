"""Floating-point operations of the parts of a run, from its settings."""

from sat_jax.config import Config
from sat_jax.models.build import layout_of
from sat_jax.models.decoder_config import DecoderConfig
from sat_jax.sparsity.controller import Rung
from sat_jax.sparsity.flops import correction_flops, probe_flops, training_flops
from sat_jax.sparsity.importance import METRICS
from sat_jax.train.probe import probe_shape


def step_flops(config: Config, model: DecoderConfig, rung: Rung | None = None) -> float:
    """Return the training FLOPs a token on a rung, recomputation included; None: densely. Mask
    execution computes everything on every rung."""
    segments, sparse = None, config.sparsity
    if rung is not None and sparse.execution != "mask":
        segments = rung.plan.segments
    flops = training_flops(
        *(layout_of(model), config.data.row_length, segments, config.model.remat),
        kernels=sparse.execution == "kernel",
        dense_forward=sparse.dense_forward,
    )
    return flops.total


def flops_of_probe(config: Config, model: DecoderConfig) -> float:
    """Return the FLOPs of one probe."""
    sparse = config.sparsity
    rows, length = probe_shape(
        config.train.rows_per_step, config.data.row_length, sparse.probe_tokens
    )
    gradients = "gradients" in METRICS[sparse.metric].needs
    layout = layout_of(model)
    token = probe_flops(layout, length, gradients, sparse.least_squares_correction)
    return rows * length * token


def flops_of_selection(config: Config, model: DecoderConfig, rung: Rung) -> float:
    """Return the FLOPs of what follows a selection: the least-squares correction."""
    if not config.sparsity.least_squares_correction:
        return 0.0
    return correction_flops(layout_of(model), rung.plan.segments)
