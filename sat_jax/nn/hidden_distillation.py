"""Distillation of hidden states: the residual stream after layers of the student learns that after
layers of the teacher, through trained linear projections where the widths differ (TinyBERT, Jiao et
al., arXiv:1909.10351, equation 8)."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from sat_jax.errors import UserError
from sat_jax.nn.decoder import Decoder
from sat_jax.nn.layout import Layout, make_layout
from sat_jax.nn.param import EMBED

HiddenLoss = Literal["mse", "cosine"]
PROJECTION = "hidden_projection"
"""The path of the projections `[pairs, E, D]`, and the name of the attribute of the student."""

_SMALLEST = 1e-12  # of squared norms that are divided by


@dataclasses.dataclass(frozen=True)
class HiddenSettings:
    """The loss of a token has `hidden_weight` · the mean over pairs of layers of the distance
    between the projected hidden state of the student and that of the teacher. Layers are numbered
    from 0; `layer_pairs` has the meaning of empty tuples."""

    hidden_weight: float = 0.0
    hidden_loss: HiddenLoss = "mse"
    hidden_layers: tuple[int, ...] = ()
    teacher_layers: tuple[int, ...] = ()


def layer_pairs(
    settings: HiddenSettings, layers: int, teacher_layers: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the layers of the student, and the layer of the teacher that each of them learns.

    By default all layers of the student; of the teacher those at the same relative depth, rounded
    to deeper ones, so that last layers belong together. Raises `UserError` for layers that do not
    exist, and for tuples of different lengths.
    """
    own = settings.hidden_layers or tuple(range(layers))
    uniform = tuple(-(-(layer + 1) * teacher_layers // layers) - 1 for layer in own)
    learned = settings.teacher_layers or uniform
    for name, numbers, count in (
        ("hidden_layers", own, layers),
        ("teacher_layers", learned, teacher_layers),
    ):
        if wrong := [number for number in numbers if not 0 <= number < count]:
            raise UserError(f"distill.{name} {wrong[0]}; accepted: 0 to {count - 1}")
    if len(own) != len(learned):
        raise UserError(
            f"distill.teacher_layers has {len(learned)} layers for {len(own)} of the student;"
            " accepted: one for each"
        )
    return own, learned


@functools.cache
def projected_layout(layout: Layout[Decoder], pairs: int, width: int) -> Layout[Decoder]:
    """Return the layout of a student with projections to the `width` of the teacher, which are
    trained beside it."""
    shape = (pairs, width, layout.shapes["embed"].shape[-1])
    student = layout.bind(dict(layout.shapes))
    axes = ("pair", "teacher_embed", EMBED)
    setattr(
        student,
        PROJECTION,
        nnx.Param(jax.ShapeDtypeStruct(shape, jnp.float32), axes=axes, role="read"),
    )
    result = make_layout(student)
    leaves = {path: layout.leaves.get(path, leaf) for path, leaf in result.leaves.items()}
    return dataclasses.replace(result, leaves=leaves)


def new_projections(shape: tuple[int, ...], key: jax.Array) -> Float[Array, "P E D"]:
    """Return random projections that keep the mean square of a hidden state."""
    return jax.random.normal(key, shape) * shape[-1] ** -0.5


def _relative_square(x: Array, of_teacher: Array) -> Float[Array, "..."]:
    size = jnp.sum(of_teacher**2, axis=-1)
    return jnp.sum((x - of_teacher) ** 2, axis=-1) / jnp.maximum(size, _SMALLEST)


def _cosine_distance(x: Array, of_teacher: Array) -> Float[Array, "..."]:
    sizes = jnp.sum(x**2, axis=-1) * jnp.sum(of_teacher**2, axis=-1)
    product = jnp.sum(x * of_teacher, axis=-1)
    return 1 - product * jax.lax.rsqrt(jnp.maximum(sizes, _SMALLEST))


HIDDEN_LOSSES: Mapping[HiddenLoss, Callable[[Array, Array], Array]] = {
    "mse": _relative_square,
    "cosine": _cosine_distance,
}
"""Distances of hidden states `[..., E]` of student and teacher, `[...]`: the squared difference
relative to the square of the teacher's state, so that layers with large states do not outweigh the
others; and 1 - cosine (DistilBERT, arXiv:1910.01108, section 3)."""


def hidden_loss(
    states_LBTD: Float[Array, "L B T D"],
    teacher_states_LBTE: Float[Array, "N B T E"],
    projections_PED: Float[Array, "P E D"] | None,
    loss_mask_BT: Bool[Array, "B T"],
    settings: HiddenSettings,
) -> Float[Array, ""]:
    """Return the mean over pairs of layers of the distances, summed over the loss mask, float32.

    States are those of all layers. Without projections, both have the same width. Each pair is
    computed again in the backward pass: no float32 state is stored.
    """
    own, learned = layer_pairs(settings, len(states_LBTD), len(teacher_states_LBTE))
    distance = HIDDEN_LOSSES[settings.hidden_loss]

    @jax.checkpoint
    def of_pair(total: Array, pair: tuple[Any, ...]) -> tuple[Array, None]:
        x, of_teacher, projection = pair
        if projection is not None:
            weight = projection.astype(x.dtype)
            x = jnp.einsum("BTD,ED->BTE", x, weight, preferred_element_type=jnp.float32)
        distances = distance(x.astype(jnp.float32), of_teacher.astype(jnp.float32))
        return total + jnp.sum(jnp.where(loss_mask_BT, distances, 0.0)), None

    pairs = (states_LBTD[jnp.array(own)], teacher_states_LBTE[jnp.array(learned)], projections_PED)
    total, _ = jax.lax.scan(of_pair, jnp.zeros((), jnp.float32), pairs)
    return total / len(own)
