"""Structured pruning: a smaller model without some heads, channels, width or layers.

What can be removed are named axes: the units of branches, `embed` (the residual stream) and
`layer`. The same number of units is removed in each layer, so that one config describes the model.
"""

import dataclasses
from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from sat_jax.compress.layers import Rows
from sat_jax.compress.unit_scores import IMPORTANCE, Track, unit_scores
from sat_jax.errors import UserError
from sat_jax.interop.huggingface_config import config_from_json, config_to_json
from sat_jax.models.build import layout_of
from sat_jax.models.decoder_config import DecoderConfig
from sat_jax.models.registry import format_of
from sat_jax.models.resize import axis_sizes, resized
from sat_jax.nn.layout import Layout, Leaf
from sat_jax.nn.param import EMBED, LAYER, NORM
from sat_jax.sparsity.plan import kept_count

STRUCTURED = "structured"
Kept = Mapping[str, Int[np.ndarray, "*lead kept"]]
"""Sorted indices by axis: `[L, *within, kept]` of units of branches, `[kept]` of other axes."""


@dataclasses.dataclass(frozen=True)
class Structured:
    """Structured pruning with its settings.

    `remove`: the share that is removed of each axis, rounded to the nearest number of units; of
    nested units, in each unit around them. `importance`: how the units of branches are scored;
    `embed` and `layer` have scores of their own (see `unit_scores`). Raises `UserError` for
    settings that are not accepted.
    """

    method: str = STRUCTURED
    remove: Mapping[str, float] = dataclasses.field(default_factory=dict)
    importance: str = "output"

    def __post_init__(self) -> None:
        if self.importance not in IMPORTANCE:
            raise UserError(f"importance {self.importance!r}; accepted: {', '.join(IMPORTANCE)}")
        if not self.remove:
            raise UserError("structured pruning needs shares to remove, such as channel=0.25")
        for axis, share in self.remove.items():
            if not 0 < share < 1:
                raise UserError(f"remove {axis}={share:g}; accepted: a share between 0 and 1")

    def kept(self, config: DecoderConfig) -> dict[str, int]:
        """Return how many units of each axis remain. Raises `UserError` for an axis that the model
        does not have or cannot omit, and for a share that removes nothing."""
        sizes, accepted = axis_sizes(config), [*layout_of(config).units, EMBED, LAYER]
        kept = {}
        for axis, share in self.remove.items():
            if axis not in accepted:
                raise UserError(
                    f"remove {axis}: {config.family} has no such units; accepted:"
                    f" {', '.join(accepted)}"
                )
            kept[axis] = kept_count(sizes[axis], share)
            if kept[axis] == sizes[axis]:
                raise UserError(
                    f"remove {axis}={share:g} removes none of {sizes[axis]}; accepted: a share that"
                    " removes at least one, and leaves one"
                )
        return kept

    def smaller(self, config: DecoderConfig) -> DecoderConfig:
        """Return the config of the pruned model. Raises `UserError` where its family has none, or
        config.json does not express it."""
        smaller = resized(config, self.kept(config))
        config_from_json(config_to_json(smaller, "float32"), "config of the pruned model")
        return smaller


class PrunedModel(NamedTuple):
    """A smaller model: config and values by path, and by axis the kept indices and a summary.

    The `summary` of an axis has its size, the number that is kept, and for each layer (or once, of
    `embed` and `layer`) the `removed` indices as ranges, their share of the sum of all scores, the
    highest score that is removed and the lowest one that is kept. Nested units are numbered through
    a layer.
    """

    config: DecoderConfig
    values: dict[str, Array]
    kept: Kept
    summary: dict[str, dict[str, Any]]


def prune_units(
    config: DecoderConfig,
    values: MutableMapping[str, np.ndarray],
    batches: Sequence[Rows],
    method: Structured,
    track: Track = iter,
) -> PrunedModel:
    """Return the model without the units of lowest scores.

    All scores are of the full model. `values` are its parameters by path; the mapping is empty
    afterwards. `batches` as in `unit_scores`. Raises
    `UserError` for settings that are not accepted, and for scores that are not finite.
    """
    smaller, counts, layout = method.smaller(config), method.kept(config), layout_of(config)
    scores = unit_scores(config, values, batches, counts, method.importance, track)
    kept, summary = {}, {}
    for axis, of_axis in scores.items():
        if not np.isfinite(of_axis).all():
            raise UserError(
                f"the scores of {axis} are not finite; accepted: a model whose weights and"
                " activations are finite on the calibration text"
            )
        if _in_shared_tensor(config, axis):
            of_axis = np.broadcast_to(of_axis.mean(0, keepdims=True), of_axis.shape)
        kept[axis] = highest(of_axis, counts[axis])
        summary[axis] = _summary(of_axis, kept[axis])
    return PrunedModel(smaller, gather_kept(layout, values, kept), kept, summary)


def highest(scores: Float[np.ndarray, "*lead n"], count: int) -> Int[np.ndarray, "*lead count"]:
    """Return the sorted indices of the highest scores on the last axis; the lower ones at a tie."""
    return np.sort(np.argsort(-scores, axis=-1, kind="stable")[..., :count])


def gather_kept(
    layout: Layout[Any], values: MutableMapping[str, np.ndarray], kept: Kept
) -> dict[str, Array]:
    """Return what is kept of all parameters, on the device; `values` is empty afterwards."""
    return {
        path: jnp.asarray(_gather(values.pop(path), leaf, kept))
        for path, leaf in layout.leaves.items()
    }


def _in_shared_tensor(config: DecoderConfig, axis: str) -> bool:
    """Whether files have one tensor for all layers with this axis, so that the same units have to
    be removed in each layer."""
    leaves = layout_of(config).leaves
    return any(
        tensor.stacked and "{layer}" not in tensor.huggingface.name and axis in leaves[path].axes
        for tensor in format_of(config).tensors
        for path in tensor.paths
        if path in leaves
    )


def _gather(array: np.ndarray, leaf: Leaf, kept: Kept) -> np.ndarray:
    """Return the entries of an array that are kept along its axes."""
    # Innermost units first, as their indices are within all units around them.
    for number, name in reversed(list(enumerate(leaf.axes))):
        axis = EMBED if name == NORM else name
        if axis in (EMBED, LAYER) and axis in kept:
            array = np.take(array, kept[axis], axis=number)
        elif axis in kept:
            rows = array.reshape(-1, *array.shape[number:])
            parts = zip(rows, kept[axis].reshape(len(rows), -1), strict=True)
            gathered = np.stack([part[indices] for part, indices in parts])
            array = gathered.reshape(*array.shape[:number], *gathered.shape[1:])
    return array


def _summary(
    scores: Float[np.ndarray, "*lead n"], kept: Int[np.ndarray, "*lead kept"]
) -> dict[str, Any]:
    """Return the summary of an axis (see `PrunedModel`)."""
    is_kept = indicator(kept, scores.shape[-1])
    by_layer = len(scores) if scores.ndim > 1 else 1
    rows = zip(scores.reshape(by_layer, -1), is_kept.reshape(by_layer, -1), strict=True)
    return {
        "of": scores.shape[-1],
        "kept": kept.shape[-1],
        "layers": [
            {
                "removed": _ranges(np.flatnonzero(~keep)),
                "share_of_scores": float(row[~keep].sum() / (row.sum() or 1)),
                "highest_removed": float(row[~keep].max()),
                "lowest_kept": float(row[keep].min()),
            }
            for row, keep in rows
        ],
    }


def indicator(kept: Int[np.ndarray, "*lead kept"], size: int) -> Bool[np.ndarray, "*lead {size}"]:
    """Return True where an index below `size` is kept."""
    result = np.zeros((*kept.shape[:-1], size), bool)
    np.put_along_axis(result, kept, True, axis=-1)
    return result


def _ranges(indices: Int[np.ndarray, " n"]) -> str:
    """Return sorted numbers as text: `0-2 5` of 0, 1, 2 and 5."""
    runs = np.split(indices, np.flatnonzero(np.diff(indices) > 1) + 1)
    return " ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)
