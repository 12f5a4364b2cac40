"""Knowledge distillation from logits (Hinton et al., arXiv:1503.02531): the loss between the token
distributions of a student and a frozen teacher, in chunks of positions."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from sat_jax.nn.context import HIDDEN, Observed
from sat_jax.nn.decoder import Decoder
from sat_jax.nn.hidden_distillation import PROJECTION, HiddenSettings, hidden_loss
from sat_jax.nn.layout import Layout
from sat_jax.nn.loss import loss_chunk, rows_of_devices, scaled, scan_chunks
from sat_jax.nn.mesh_axes import full_rows
from sat_jax.nn.top_tokens import TopTokens, grouped

Divergence = Literal["forward", "reverse", "js"]


@dataclasses.dataclass(frozen=True)
class DistillSettings(HiddenSettings):
    """The loss of a token: (1 - `weight`) · cross-entropy + `weight` · `temperature`² · divergence,
    with the divergence of the distributions softmax(logits / `temperature`). The square keeps the
    size of gradients (section 2 of the paper). The loss of hidden states is added."""

    weight: float = 0.5
    temperature: float = 1.0
    divergence: Divergence = "forward"


class Distillation(NamedTuple):
    """The layout of the teacher, and the settings."""

    teacher: Layout[Decoder]
    settings: DistillSettings


class TeacherStates(NamedTuple):
    """The last hidden states of a teacher, and its head."""

    hidden: Float[Array, "B T E"]
    head: Float[Array, "V E"]


class LossParts(NamedTuple):
    """Cross-entropy at temperature 1 and divergence at the temperature of the settings, in nats,
    without weights."""

    cross_entropy: Float[Array, "..."]
    divergence: Float[Array, "..."]


def _relative_entropy(log_p: Array, log_q: Array) -> Float[Array, "..."]:
    """Return KL(p ‖ q) along the last axis."""
    return jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)


def _jensen_shannon(log_p: Array, log_q: Array) -> Float[Array, "..."]:
    log_m = jnp.logaddexp(log_p, log_q) - math.log(2)
    return (_relative_entropy(log_p, log_m) + _relative_entropy(log_q, log_m)) / 2


DIVERGENCES: Mapping[Divergence, Callable[[Array, Array], Array]] = {
    "forward": _relative_entropy,
    "reverse": lambda log_p, log_q: _relative_entropy(log_q, log_p),
    "js": _jensen_shannon,
}
"""Functions of the log-probabilities `[..., V]` of teacher and student that return `[...]`, nats:
KL(teacher ‖ student), KL(student ‖ teacher), and the mean of the relative entropies to the mixture
of both in equal parts (Jensen-Shannon, at most log 2)."""


def token_losses(
    logits: Float[Array, "... V"],
    teacher: Float[Array, "... V"] | TopTokens,
    targets: Int[Array, "..."],
    settings: DistillSettings,
) -> LossParts:
    """Return cross-entropy and divergence of each token. The teacher is given by its logits, or by
    its most likely tokens; all others are then one outcome, for the student too."""
    log_q = jax.nn.log_softmax(logits / settings.temperature)
    if isinstance(teacher, TopTokens):
        log_p, log_q = teacher.log_p, grouped(log_q, teacher.ids)
    else:
        log_p = jax.nn.log_softmax(teacher / settings.temperature)
    target = jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], axis=-1)[..., 0]
    return LossParts(-target, DIVERGENCES[settings.divergence](log_p, log_q))


def objective(parts: LossParts, settings: DistillSettings) -> Float[Array, "..."]:
    """Return the weighted sum of the parts."""
    weight, temperature = settings.weight, settings.temperature
    return (1 - weight) * parts.cross_entropy + weight * temperature**2 * parts.divergence


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def chunked_distillation_loss(
    hidden_BTD: Float[Array, "B T D"],
    head_VD: Float[Array, "V D"],
    teacher: TeacherStates | TopTokens,
    targets_BT: Int[Array, "B T"],
    loss_mask_BT: Bool[Array, "B T"],
    chunk: int,
    settings: DistillSettings,
) -> tuple[Float[Array, ""], LossParts]:
    """Return the objective and its parts, each summed over the loss mask, float32.

    Logits of `chunk` positions of each row are in memory at a time, for student and teacher.
    Differentiable are `hidden` and `head` of the objective: the teacher is a constant, and the
    parts have no gradient.
    """
    arrays = (hidden_BTD, head_VD, teacher, targets_BT, loss_mask_BT)
    return _forward(*arrays, chunk, settings)[0]


def _forward(
    hidden_BTD: Array,
    head_VD: Array,
    teacher: TeacherStates | TopTokens,
    targets_BT: Array,
    loss_mask_BT: Array,
    chunk: int,
    settings: DistillSettings,
) -> tuple[tuple[Array, LossParts], tuple[Array, Array]]:
    def logits_of(h_BCD: Array, head: Array) -> Array:
        return jnp.einsum("BCD,VD->BCV", h_BCD, head, preferred_element_type=jnp.float32)

    def of_chunk(
        h_BCD: Array, targets_BC: Array, mask_BC: Array, *of_teacher: Array
    ) -> tuple[LossParts, Array]:
        if isinstance(teacher, TopTokens):
            known: Array | TopTokens = TopTokens(*of_teacher)
        else:
            known = logits_of(of_teacher[0], teacher.head)

        def loss(logits: Array) -> tuple[Array, LossParts]:
            parts = token_losses(logits, known, targets_BC, settings)
            rows = (jnp.sum(jnp.where(mask_BC, part, 0.0), axis=-1) for part in parts)
            parts = LossParts(*rows)
            return objective(parts, settings).sum(), parts

        d_logits, parts = jax.grad(loss, has_aux=True)(logits_of(h_BCD, head_VD))
        return parts, d_logits

    of_positions = teacher if isinstance(teacher, TopTokens) else (teacher.hidden,)
    arrays = (targets_BT, loss_mask_BT, *of_positions)
    parts, gradients = scan_chunks(of_chunk, chunk, hidden_BTD, head_VD, *arrays)
    sums = LossParts(*(part.sum() for part in parts))
    return (objective(sums, settings), sums), gradients


def _backward(
    chunk: int,
    settings: DistillSettings,
    gradients: tuple[Array, Array],
    cotangents: tuple[Array, LossParts],
) -> tuple[Array | None, ...]:
    del chunk, settings
    return *scaled(gradients, cotangents[0]), None, None, None


chunked_distillation_loss.defvjp(_forward, _backward)


def distillation_loss(
    model: Decoder,
    teacher: Decoder | TopTokens,
    settings: DistillSettings,
    tokens: Int[Array, "B T"],
    targets: Int[Array, "B T"],
    segment_ids: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    loss_mask: Bool[Array, "B T"],
    **options: Any,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]], tuple[Observed, ...]]:
    """Return the loss and its parts, each summed over the loss mask, and the observations of the
    student; `options` are those of its `Decoder.hidden`."""
    inputs = (tokens, segment_ids, positions)
    kinds = (HIDDEN,) if settings.hidden_weight else ()
    options["observe"] = (*options.get("observe", ()), *kinds)
    x_BTD, observed = model.hidden(*inputs, **options)
    known: TeacherStates | TopTokens
    of_teacher: tuple[Observed, ...] = ()
    if isinstance(teacher, TopTokens):
        known = TopTokens(*map(rows_of_devices, teacher))
    else:
        x_BTE, of_teacher = teacher.hidden(*inputs, observe=kinds)
        known = TeacherStates(rows_of_devices(x_BTE), full_rows(teacher.head()))
    rows_BTD, row_targets, row_mask = map(rows_of_devices, (x_BTD, targets, loss_mask))
    total, sums = chunked_distillation_loss(
        *(rows_BTD, full_rows(model.head()), known),
        *(row_targets, row_mask, loss_chunk(model), settings),
    )
    parts = sums._asdict()
    if settings.hidden_weight:
        projections = getattr(model, PROJECTION, None)
        parts["hidden"] = hidden_loss(
            *(_hidden_states(observed), _hidden_states(of_teacher)),
            None if projections is None else projections[...],
            loss_mask,
            settings,
        )
        total += settings.hidden_weight * parts["hidden"]
        observed = tuple({k: v for k, v in part.items() if k != HIDDEN} for part in observed)
    return total, parts, observed


def _hidden_states(observed: tuple[Observed, ...]) -> Float[Array, "L B T D"]:
    return jnp.concatenate([part[HIDDEN][HIDDEN] for part in observed])
