"""Next-token cross-entropy in chunks of positions, without the logits of a full batch in memory."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int, Shaped

from sat_jax.nn.context import Observed
from sat_jax.nn.decoder import Decoder
from sat_jax.nn.mesh_axes import CONTEXT, ROW_AXES, full_rows, parts
from sat_jax.nn.pipeline import number_of_stages

_PART_AXES = (CONTEXT, *ROW_AXES)  # which split the rows of `rows_of_devices`, in this order


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def chunked_cross_entropy(
    hidden_BTD: Float[Array, "B T D"],
    head_VD: Float[Array, "V D"],
    targets_BT: Int[Array, "B T"],
    loss_mask_BT: Bool[Array, "B T"],
    chunk: int,
) -> Float[Array, ""]:
    """Return the sum of -log p(target) over the loss mask, float32, natural logarithm.

    Logits of `chunk` positions of each row are in memory at a time. Differentiation computes the
    gradients in the same pass over the chunks, so that logits are computed once. On a mesh each
    device sums losses and gradients of the head over its rows; devices are reduced once, after the
    last chunk.
    """

    def body(_: None, xs: tuple[Array, ...]) -> tuple[None, Float[Array, " B"]]:
        h_BCD, targets_BC, mask_BC = xs
        return None, _summed_loss(_scores(head_VD, h_BCD, targets_BC), mask_BC)

    _, losses = jax.lax.scan(
        body, None, split_positions(chunk, hidden_BTD, targets_BT, loss_mask_BT)
    )
    return losses.sum()


class _Scores(NamedTuple):
    """Logits of a chunk of positions, `exp(logits - their maximum)`, its sum, the log-sum-exp of
    the logits, and the logits of the targets."""

    logits: Float[Array, "B C V"]
    exp: Float[Array, "B C V"]
    total: Float[Array, "B C 1"]
    log_z: Float[Array, "B C"]
    target: Float[Array, "B C"]


def _scores(head_VD: Array, h_BCD: Array, targets_BC: Array) -> _Scores:
    logits = jnp.einsum("BCD,VD->BCV", h_BCD, head_VD, preferred_element_type=jnp.float32)
    highest = logits.max(axis=-1, keepdims=True)
    exp = jnp.exp(logits - highest)
    total = exp.sum(axis=-1, keepdims=True)
    target = jnp.take_along_axis(logits, targets_BC[..., None], axis=-1)[..., 0]
    return _Scores(logits, exp, total, (highest + jnp.log(total))[..., 0], target)


def _summed_loss(scores: _Scores, mask_BC: Array) -> Float[Array, " B"]:
    return jnp.sum(jnp.where(mask_BC, scores.log_z - scores.target, 0.0), axis=-1)


def token_scores(
    hidden_BTD: Float[Array, "B T D"],
    head_VD: Float[Array, "V D"],
    targets_BT: Int[Array, "B T"],
    chunk: int,
) -> tuple[Float[Array, "B T"], Bool[Array, "B T"]]:
    """Return log p(target) at every position, and whether the target has the highest probability.

    Float32, natural logarithm; in chunks, as in `chunked_cross_entropy`.
    """

    def body(_: None, xs: tuple[Array, ...]) -> tuple[None, tuple[Array, Array]]:
        h_BCD, targets_BC = xs
        scores = _scores(head_VD, h_BCD, targets_BC)
        greedy_BC = jnp.argmax(scores.logits, axis=-1) == targets_BC
        return None, (scores.target - scores.log_z, greedy_BC)

    _, chunks = jax.lax.scan(body, None, split_positions(chunk, hidden_BTD, targets_BT))
    batch, length = targets_BT.shape
    log_p_BT, greedy_BT = (jnp.moveaxis(x, 0, 1).reshape(batch, -1)[:, :length] for x in chunks)
    return log_p_BT, greedy_BT


def split_positions(chunk: int, *arrays_BT: Array) -> tuple[Array, ...]:
    """Return `[B, T, ...]` as `[T / chunk, B, chunk, ...]`, with zeros at the end (masked out)."""

    def split(x: Array) -> Array:
        length = x.shape[1]
        size = min(chunk, length)
        pad = -length % size
        x = jnp.pad(x, [(0, 0), (0, pad)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(x.shape[0], -1, size, *x.shape[2:]), 1, 0)

    return tuple(split(x) for x in arrays_BT)


def _forward(
    hidden_BTD: Array, head_VD: Array, targets_BT: Array, loss_mask_BT: Array, chunk: int
) -> tuple[Float[Array, ""], tuple[Array, Array]]:
    def of_chunk(h_BCD: Array, targets_BC: Array, mask_BC: Array) -> tuple[Array, Array]:
        scores = _scores(head_VD, h_BCD, targets_BC)
        one_hot = jax.nn.one_hot(targets_BC, head_VD.shape[0], dtype=jnp.float32)
        d_logits = jnp.where(mask_BC[..., None], scores.exp / scores.total - one_hot, 0.0)
        return _summed_loss(scores, mask_BC), d_logits

    losses, gradients = scan_chunks(of_chunk, chunk, hidden_BTD, head_VD, targets_BT, loss_mask_BT)
    return losses.sum(), gradients


def scan_chunks(
    of_chunk: Callable[..., tuple[Any, Array]],
    chunk: int,
    hidden_BTD: Float[Array, "B T D"],
    head_VD: Float[Array, "V D"],
    *arrays_BT: Array,
) -> tuple[Any, tuple[Float[Array, "B T D"], Float[Array, "V D"]]]:
    """Return the losses of all chunks of positions, stacked, and the gradients of their sum with
    respect to `hidden` and `head`.

    `of_chunk(h_BCD, *arrays_BC)` returns the losses of one chunk, and the gradient of their sum
    with respect to its logits `[B, C, V]`, float32.
    """
    batch, length, width = hidden_BTD.shape
    number = _row_parts(batch)

    def body(d_head_PVD: Array, xs: tuple[Array, ...]) -> tuple[Array, tuple[Any, Array]]:
        h_BCD = xs[0]
        losses, d_logits = of_chunk(*xs)
        d_logits = d_logits.astype(head_VD.dtype)
        d_hidden = jnp.einsum("BCV,VD->BCD", d_logits, head_VD)
        rows = [x.reshape(number, -1, *x.shape[1:]) for x in (d_logits, h_BCD)]
        # The product is transposed, not an operand: on XLA:CPU [V, C] would be computed again.
        d_head_PDV = jnp.einsum("PBCV,PBCD->PDV", *rows, preferred_element_type=jnp.float32)
        return d_head_PVD + d_head_PDV.swapaxes(1, 2), (losses, d_hidden)

    chunks = split_positions(chunk, hidden_BTD, *arrays_BT)
    zeros_PVD = jnp.zeros((number, *head_VD.shape), jnp.float32)
    if number > 1:
        spec = P(_PART_AXES, P.UNCONSTRAINED, P.UNCONSTRAINED)
        zeros_PVD = jax.lax.with_sharding_constraint(zeros_PVD, spec)
    d_head_PVD, (losses, d_hidden) = jax.lax.scan(body, zeros_PVD, chunks)
    d_hidden_BTD = jnp.moveaxis(d_hidden, 0, 1).reshape(batch, -1, width)[:, :length]
    return losses, (d_hidden_BTD, d_head_PVD.sum(0).astype(head_VD.dtype))


def _row_parts(batch: int) -> int:
    """Return the number of parts in which the mesh splits the rows. Each part sums its gradient of
    the head, so that devices communicate once and not at every chunk."""
    number = parts(*_PART_AXES)
    return 1 if batch % number else number


def rows_of_devices(x: Shaped[Array, "B T ..."]) -> Shaped[Array, "cB T/c ..."]:
    """Return each row as c rows, one for each device that has a part of its tokens, those of the
    first device first: chunks of positions are then local to a device."""
    batch, length, *rest = x.shape
    devices = parts(CONTEXT)
    if devices == 1 or length % devices:
        return x
    by_device = x.reshape(batch, devices, -1, *rest).swapaxes(0, 1)
    return by_device.reshape(devices * batch, -1, *rest)


def _backward(
    chunk: int, residuals: tuple[Array, Array], cotangent: Float[Array, ""]
) -> tuple[Array, Array, None, None]:
    del chunk
    return *scaled(residuals, cotangent), None, None


def scaled(gradients: tuple[Array, Array], cotangent: Float[Array, ""]) -> tuple[Array, Array]:
    """Return gradients times a cotangent, each in its dtype."""
    d_hidden, d_head = gradients
    scale = cotangent.astype(jnp.float32)
    return (d_hidden * scale).astype(d_hidden.dtype), (d_head * scale).astype(d_head.dtype)


chunked_cross_entropy.defvjp(_forward, _backward)


def perplexity_of(loss: float) -> float:
    """Return the perplexity of a mean loss in nats; infinity if it exceeds the largest
    float, NaN for NaN."""
    return math.inf if loss >= 709 else math.exp(loss)  # exp(NaN) is NaN


def next_token_loss(
    model: Decoder,
    tokens: Int[Array, "B T"],
    targets: Int[Array, "B T"],
    segment_ids: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    loss_mask: Bool[Array, "B T"],
    **options: Any,
) -> tuple[Float[Array, ""], tuple[Observed, ...]]:
    """Return the sum of the cross-entropy over the loss mask (natural logarithm), and the
    observations; `options` are those of `Decoder.hidden`."""
    x_BTD, observed = model.hidden(tokens, segment_ids, positions, **options)
    x, targets, loss_mask = map(rows_of_devices, (x_BTD, targets, loss_mask))
    head = full_rows(model.head())
    return chunked_cross_entropy(x, head, targets, loss_mask, loss_chunk(model)), observed


def loss_chunk(model: Decoder) -> int:
    """Return the positions of each row whose logits are in memory at a time."""
    chunk = model.compute.loss_chunk
    if model.pipelined:  # A device has the rows of several microbatches: as many logits as of one.
        chunk = max(1, chunk * number_of_stages() // model.compute.microbatches)
    return chunk
