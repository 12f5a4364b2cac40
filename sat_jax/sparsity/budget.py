"""Spreading one omission rate over layers that suffer differently from it.

A calibration (`train.calibrate`) measures by how much the loss rises where one block of layers
alone omits neurons. To first approximation the rises of several blocks add up and each grows with
the square of the block's rate, so that the best rates for a mean over layers have a closed form.
"""

import dataclasses
import itertools
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from sat_jax.errors import UserError

_HIGHEST = 0.9  # no layer omits more: far from the rate of a calibration its law does not hold
# A block whose loss did not rise, or fell, is taken to be a little sensitive: noise is not worth
# more.
_LEAST_SHARE = 0.02
_NEAR = 0.02  # a mean so near to the asked one is not worth cuts in worse places
_RESOLUTION = 1e-7  # nats a token: float32 losses tell no smaller rise from none


@dataclasses.dataclass(frozen=True)
class Sensitivity:
    """What a calibration measured of a model of `layers` layers, `model` by its shape, whose
    neurons were chosen by `metric`.

    The loss a token, in nats, rises by `attention[b]` where the heads of block b, the layers
    `[borders[b], borders[b + 1])`, are omitted at the realised rate `rate_attention`, and by
    `mlp[b]` for channels at `rate_mlp`.
    """

    borders: tuple[int, ...]
    rate_attention: float
    rate_mlp: float
    attention: tuple[float, ...]
    mlp: tuple[float, ...]
    model: str
    metric: str

    @property
    def layers(self) -> int:
        return self.borders[-1]

    @property
    def sizes(self) -> list[int]:
        """Layers of each block."""
        return [stop - start for start, stop in itertools.pairwise(self.borders)]


def save(sensitivity: Sensitivity, path: Path) -> None:
    """Writes a calibration as JSON, for `sparsity.budget`."""
    try:
        path.write_text(json.dumps(dataclasses.asdict(sensitivity), indent=2) + "\n")
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}") from error


def load(path: Path, model: str, metric: str) -> Sensitivity:
    """Reads a calibration. Raises `UserError` for none, or one of another model or metric."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        lists = {name: tuple(v) for name, v in content.items() if isinstance(v, list)}
        found = Sensitivity(**content | lists)
        sound = 0 < found.rate_attention <= 1 and 0 < found.rate_mlp <= 1
        counts = {len(found.attention), len(found.mlp), len(found.sizes)}
        sound &= len(counts) == 1 and found.borders[0] == 0 and min(found.sizes) > 0
        sound &= bool(np.isfinite([*found.attention, *found.mlp]).all())
    except (OSError, ValueError, TypeError, AttributeError, IndexError) as error:
        raise UserError(f"sparsity.budget {path}: no calibration: {error}") from error
    if not sound:
        raise UserError(
            f"sparsity.budget {path}: its blocks, rates and losses do not fit together; make it"
            " anew with scripts.calibrate"
        )
    for name, made, wanted in (("model", found.model, model), ("metric", found.metric, metric)):
        if made != wanted:
            raise UserError(
                f"sparsity.budget {path}: a calibration with {name} {made!r}, and the run's is"
                f" {wanted!r}; make another with scripts.calibrate"
            )
    return found


class _Spread(NamedTuple):
    """Units omitted a layer in each run; by how much their share of all misses the asked rate; and
    what the loss rises by, at that rate if it is spread in these proportions."""

    units: Int[np.ndarray, " runs"]
    miss: float
    loss: float


def allocate(
    sensitivity: Sensitivity,
    attention: float,
    mlp: float,
    max_segments: int,
    units: tuple[int, int],
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """The rate of every layer's heads and channels, with the means `attention` and `mlp`, in at
    most `max_segments` runs of layers with equal rates: those that let the loss rise least.

    With S_i the sum of a run's rises, each over the square of its rate, and n_i its layers, the
    rates ρ_i ∝ n_i / S_i minimise Σ S_i ρ_i² at a given Σ n_i ρ_i; none is above 0.9. A layer omits
    whole units, of its `units` of heads and of channels, never all: each run takes the count
    below or above its best rate, so that the mean comes nearest to the asked one. Runs are cut
    where both means come within 0.02, or as near as they can.
    """
    sizes = np.array(sensitivity.sizes)
    heads = _curvature(sensitivity.attention, sensitivity.rate_attention)
    channels = _curvature(sensitivity.mlp, sensitivity.rate_mlp)
    asked = ((heads, attention, units[0]), (channels, mlp, units[1]))
    found = []
    for runs in _partitions(len(sizes), max_segments):
        counts = np.add.reduceat(sizes, runs)
        spreads = [
            _realisable(counts, np.add.reduceat(rise, runs), mean, of) for rise, mean, of in asked
        ]
        found.append((counts, spreads))
    counts, spreads = _best(found)
    by_layer = [
        tuple(float(round(rate, 6)) for rate in np.repeat(spread.units / of, counts))
        for spread, of in zip(spreads, units, strict=True)
    ]
    return by_layer[0], by_layer[1]


def _best(found: Sequence[tuple[np.ndarray, list[_Spread]]]) -> tuple[np.ndarray, list[_Spread]]:
    """Of the cuts that meet the asked rates the one of least loss; one that gains nothing is not
    made, so of equal ones the first, which has the fewest runs."""
    misses = [max(spread.miss for spread in spreads) for _, spreads in found]
    near = max(_NEAR, min(misses))
    meeting = [one for one, miss in zip(found, misses, strict=True) if miss <= near]
    losses = [sum(spread.loss for spread in spreads) for _, spreads in meeting]
    least = min(losses) * (1 + 1e-9)
    return next(one for one, loss in zip(meeting, losses, strict=True) if loss <= least)


def _realisable(counts: np.ndarray, curvature: np.ndarray, mean: float, units: int) -> _Spread:
    """Whole units a layer for runs of `counts` layers: of the two counts around each best rate,
    those whose mean comes nearest to the asked one, and of these the ones of least loss."""
    most = min(math.floor(round(max(_HIGHEST, mean) * units, 6)), units - 1)
    best = _rates(counts, curvature, mean, most / units) * units
    below = np.floor(np.round(best, 6)).astype(int)
    around = np.stack([below, np.minimum(below + 1, most)], axis=1)
    choices = np.array(list(itertools.product(*around)))
    means = choices @ counts / (units * counts.sum())
    # Of a lower mean the rise is lower, which is no merit: it is taken to the asked one.
    fit = np.divide(mean, means, out=np.ones_like(means), where=means > 0)
    losses = np.square(choices / units) @ curvature * fit**2
    misses = np.round(np.abs(means - mean), 9)
    chosen = np.lexsort((losses, misses))[0]
    return _Spread(choices[chosen], float(misses[chosen]), float(losses[chosen]))


def _curvature(rises: Sequence[float], rate: float) -> Float[np.ndarray, " blocks"]:
    rise = np.maximum(np.array(rises), 0)
    return np.maximum(rise, max(_LEAST_SHARE * rise.mean(), _RESOLUTION)) / rate**2


def _partitions(blocks: int, runs: int) -> Iterator[list[int]]:
    """The first block of each run, for every way to cut `blocks` into up to `runs` runs, those of
    fewer runs first."""
    for cuts in range(min(runs, blocks)):
        for borders in itertools.combinations(range(1, blocks), cuts):
            yield [0, *borders]


def _rates(
    counts: np.ndarray, curvature: np.ndarray, mean: float, highest: float
) -> Float[np.ndarray, " runs"]:
    """The best rates with this mean over layers. What would be above the highest stays there, and
    the others take over the rest."""
    rates = np.zeros(len(counts))
    free = np.ones(len(counts), bool)
    while free.any():
        left = mean * counts.sum() - (counts * rates)[~free].sum()
        weight = counts / curvature
        rates[free] = weight[free] * left / (counts * weight)[free].sum()
        over = free & (rates > highest)
        if not over.any():
            break
        rates[over] = highest
        free &= ~over
    return rates
