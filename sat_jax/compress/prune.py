"""Pruning of single weights: magnitude, Wanda and SparseGPT."""

import dataclasses
from collections.abc import Callable
from typing import ClassVar, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Bool, Float

from sat_jax.compress.input_statistics import InputStatistics, Needs, statistics_of
from sat_jax.compress.method import Compressed, Saving, Varied
from sat_jax.compress.patterns import Pattern
from sat_jax.compress.sparsegpt import sparsegpt
from sat_jax.errors import UserError

Pruned = tuple[Float[Array, "out in"], Bool[Array, "out in"]]


class Method(NamedTuple):
    """A pruning method: the statistics that it reads, and the pruned and the removed weights."""

    needs: Needs
    prune: Callable[[Array, InputStatistics, Pattern, int], Pruned]


def _magnitude(weight: Array, _: InputStatistics, pattern: Pattern, block: int) -> Pruned:
    return _prune_lowest(weight, jnp.abs(weight), pattern, block)


def _wanda(weight: Array, statistics: InputStatistics, pattern: Pattern, block: int) -> Pruned:
    """Score |w| · ‖x‖₂ (Sun et al., arXiv:2306.11695)."""
    norms = jnp.asarray(np.sqrt(statistics.squares), jnp.float32)
    return _prune_lowest(weight, jnp.abs(weight) * norms[None], pattern, block)


def _prune_lowest(weight: Array, scores: Array, pattern: Pattern, block: int) -> Pruned:
    starts = range(0, weight.shape[1], block)
    parts = [pattern.removed(scores[:, start : start + block]) for start in starts]
    removed = jnp.concatenate(parts, axis=1)
    return jnp.where(removed, 0, weight), removed


PRUNING: dict[str, Method] = {
    "magnitude": Method("nothing", _magnitude),
    "wanda": Method("squares", _wanda),
    "sparsegpt": Method("gram", sparsegpt),
}


@dataclasses.dataclass(frozen=True)
class Pruning:
    """A pruning method with its settings, to be called with a matrix `[out, in]`.

    `sparsity` and `pattern` as in `Pattern`. SparseGPT selects within `block` columns at a time, as
    do all methods with a block pattern. Raises `UserError` for settings that are not accepted.
    """

    method: str
    sparsity: float = 0.5
    pattern: str | None = None
    block: int = 128
    saving: ClassVar[Saving] = "without_zeros"
    varied: ClassVar[Varied] = Varied("sparsity", (0.2, 0.4, 0.6, 0.8), 0.02)

    def __post_init__(self) -> None:
        if self.method not in PRUNING:
            raise UserError(f"method {self.method!r}; accepted: {', '.join(PRUNING)}")
        if self.block < 1:
            raise UserError(f"block {self.block}; accepted: a number of columns, 1 or more")
        if self.in_blocks:
            self._groups.check(self.block, "block")

    @property
    def needs(self) -> Needs:
        """The statistics of inputs that the method reads."""
        return PRUNING[self.method].needs

    @property
    def in_blocks(self) -> bool:
        """Whether `block` has an effect."""
        return self.method == "sparsegpt" or self._groups.in_blocks

    @property
    def _groups(self) -> Pattern:
        return Pattern(self.pattern, self.sparsity)

    def check(self, rows: int, columns: int, what: str) -> None:
        """Raise `UserError` if a matrix with this many columns cannot be pruned."""
        del rows
        self._groups.check(columns, what)

    def count(self, rows: int, columns: int) -> int:
        """Return how many weights of a matrix are removed, if no two scores are equal."""
        block = self._columns_at_once(columns)
        starts = range(0, columns, block)
        return sum(self._groups.count(rows, min(block, columns - start)) for start in starts)

    def _columns_at_once(self, columns: int) -> int:
        return min(self.block, columns) if self.in_blocks else columns

    def __call__(
        self, weight: Float[ArrayLike, "out in"], statistics: InputStatistics
    ) -> Compressed:
        """Return the pruned weights, in the dtype of `weight`, and how many weights are 0."""
        pruned, _ = self.prune(weight, statistics)
        return Compressed(pruned, int(jnp.sum(pruned == 0)))

    def prune(self, weight: Float[ArrayLike, "out in"], statistics: InputStatistics) -> Pruned:
        """Return the pruned weights, in the dtype of `weight`, and which of them are removed."""
        values = jnp.asarray(weight)
        block = self._columns_at_once(values.shape[1])
        pruned, removed = PRUNING[self.method].prune(
            values.astype(jnp.float32), statistics, self._groups, block
        )
        return pruned.astype(values.dtype), removed


def prune_matrix(
    weight: Float[ArrayLike, "out in"],
    inputs: Float[ArrayLike, "tokens in"],
    method: str = "wanda",
    sparsity: float = 0.5,
    pattern: str | None = None,
    block: int = 128,
) -> Pruned:
    """Prune one matrix W, whose outputs are inputs · Wᵀ.

    Returns the pruned weights in the dtype of `weight` (float32 for float64), and which of them are
    removed, bool `[out, in]`. `method`: magnitude, wanda or sparsegpt. `sparsity` is the share of
    each output row that is removed; with a `pattern` ("2:4", "4:8", "block", "block-threshold"; see
    `Pattern`) that of each group. SparseGPT selects within `block` columns at a time. Raises
    `UserError` for settings or shapes that are not accepted, and for inputs that are not finite.
    """
    pruning = Pruning(method, sparsity, pattern, block)
    statistics = statistics_of(weight, inputs, pruning.needs)
    rows, columns = np.shape(weight)
    pruning.check(rows, columns, "weight")
    return pruning.prune(weight, statistics)
