"""Importance of the units of branches, of the channels of the residual stream, and of layers.

Layers are run one after the other, so that beside the weights there are one layer and the residual
stream of all calibration tokens. Gradients alone are of the whole model.
"""

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from sat_jax.compress.layers import Rows, apply_layer, embed_rows, layer_weights, split_layer
from sat_jax.models.build import layout_of
from sat_jax.models.decoder_config import DecoderConfig
from sat_jax.nn.context import Observable, Observed
from sat_jax.nn.decoder import Compute, Decoder
from sat_jax.nn.layout import Layout
from sat_jax.nn.param import EMBED, LAYER
from sat_jax.sparsity.importance import METRICS, Metric, ScoreInputs, Scores, score_inputs
from sat_jax.sparsity.mask_gradients import mask_gradients
from sat_jax.sparsity.statistics import Statistics

Track = Callable[[Iterable[Any]], Iterable[Any]]
"""Wraps the iterations of a loop in a progress bar, such as `tqdm`."""


def group_norm(inputs: ScoreInputs) -> Scores:
    """Return √Σ w² over all matrices of a unit (LLM-Pruner, Ma et al., arXiv:2305.11627)."""
    squares = [jnp.sum(jnp.square(w), axis=(-2, -1)) for w in inputs.reads + inputs.writes]
    return jnp.sqrt(jnp.sum(jnp.stack(squares), axis=0))


IMPORTANCE: Mapping[str, Metric] = {
    "magnitude": Metric(group_norm),
    "output": METRICS["output"],
    "taylor": METRICS["taylor"],
}
"""Scores of the units of branches. `taylor` is LLM-Pruner's first-order score of the unit's output
weights, |Σ w · ∂L/∂w|: the gradient of a mask on the unit."""


def unit_scores(
    config: DecoderConfig,
    values: Mapping[str, np.ndarray],
    batches: Sequence[Rows],
    axes: Iterable[str],
    importance: str,
    track: Track = iter,
) -> dict[str, np.ndarray]:
    """Return scores by axis: `[L, *within, units]` of units of branches, by `importance`; `[D]` of
    `embed`: the mean |x| over tokens of the branches' normed inputs, summed over branches and
    layers (Minitron, Muralidharan et al., arXiv:2407.14679); `[L]` of `layer`: the block influence
    1 - cos(x_in, x_out), mean over tokens (ShortGPT, Men et al., arXiv:2403.03853).

    `batches` are calibration rows of equal shape; with `taylor` they have targets. Padding does not
    count.
    """
    layout, metric = layout_of(config), IMPORTANCE[importance]
    scores: dict[str, list[Any]] = {axis: [] for axis in axes}
    units = [unit for unit in layout.units if unit in scores]
    needs = metric.needs if units else ()
    tokens = sum(int(np.sum(np.asarray(rows.segment_ids) > 0)) for rows in batches)
    gradients = _gradients(config, values, track(batches)) if "gradients" in needs else {}
    observe: list[Any] = [kind for kind in needs if kind != "gradients"]
    observe += ["input_magnitudes"] if EMBED in scores else []
    if not observe and LAYER not in scores:
        batches = ()  # the weights are enough
    for layer in _run_layers(layout, values, batches, tuple(observe), track):
        of_layer = {unit: sums[layer.number][None] for unit, sums in gradients.items()}
        outputs = layer.observed.get("outputs", {})
        statistics = Statistics(jnp.float32(tokens), outputs=outputs, gradients=of_layer)
        for unit in units:
            inputs = score_inputs(layout, layer.weights, statistics, unit, jax.random.key(0))
            sizes = [layout.units[name].size for name in (*layout.units[unit].within, unit)]
            scores[unit].append(np.asarray(metric.score(inputs)).reshape(sizes))
        if EMBED in scores:
            sums = layer.observed["input_magnitudes"].values()
            scores[EMBED].append(sum(np.asarray(x.absolute[0], np.float64) for x in sums) / tokens)
        if LAYER in scores:
            scores[LAYER].append(1 - layer.similarity / tokens)
    stacked = {axis: np.asarray(by_layer) for axis, by_layer in scores.items()}
    return stacked | ({EMBED: stacked[EMBED].sum(0)} if EMBED in stacked else {})


class _Layer(NamedTuple):
    """A layer after its run: weights `[1, ...]`, what its branches observed over all batches, and
    the sum over tokens of the cosines of its input and output."""

    number: int
    weights: dict[str, Array]
    observed: Observed
    similarity: float


def _run_layers(
    layout: Layout[Decoder],
    values: Mapping[str, np.ndarray],
    batches: Sequence[Rows],
    observe: tuple[Observable, ...],
    track: Track,
) -> Iterator[_Layer]:
    streams = embed_rows(layout, values, batches)
    for number in track(range(layout.layers)):
        weights = layer_weights(layout, values, number)
        graph, state = split_layer(layout, values, weights)
        observed: Observed = {}
        similarity = 0.0
        for i, rows in enumerate(batches):
            places = rows.segment_ids, rows.positions
            output, seen = apply_layer(graph, state, streams[i], *places, observe)
            observed = jax.tree.map(jnp.add, observed, seen) if observed else seen
            similarity += float(_cosines(rows.segment_ids, streams[i], output))
            streams[i] = output
        yield _Layer(number, weights, observed, similarity)


@jax.jit
def _cosines(
    segment_ids: Int[Array, "B T"], x_BTD: Float[Array, "B T D"], y_BTD: Float[Array, "B T D"]
) -> Float[Array, ""]:
    """Return the sum over tokens of the cosines of two residual streams."""
    x, y = x_BTD.astype(jnp.float32), y_BTD.astype(jnp.float32)
    norms = jnp.linalg.norm(x, axis=-1) * jnp.linalg.norm(y, axis=-1)
    return jnp.sum(jnp.sum(x * y, axis=-1) / norms, where=segment_ids > 0)


def _gradients(
    config: DecoderConfig, values: Mapping[str, np.ndarray], batches: Iterable[Any]
) -> dict[str, Array]:
    """Return the sums of the gradients of masks over all batches, `[L, *units]` by innermost unit
    of each branch. Layers are computed again in the backward pass, which saves memory."""
    layout = layout_of(config, Compute(remat="full"))
    params = {path: jnp.asarray(value) for path, value in values.items()}
    parts = (_batch_gradients(layout, params, rows) for rows in batches)
    return functools.reduce(lambda total, part: jax.tree.map(jnp.add, total, part), parts)


@functools.partial(jax.jit, static_argnames="layout")
def _batch_gradients(
    layout: Layout[Decoder], params: Mapping[str, Array], rows: Any
) -> dict[str, Array]:
    return dict(mask_gradients(layout, params, rows).gradients)
