"""Selection of the weights that pruning removes: the lowest scores within groups of weights."""

import dataclasses
import math
import re

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from sat_jax.errors import UserError

BLOCK, BLOCK_THRESHOLD = "block", "block-threshold"
ACCEPTED = f"no pattern, N:M (2:4, 4:8, ...), {BLOCK}, {BLOCK_THRESHOLD}"


@dataclasses.dataclass(frozen=True)
class Pattern:
    """Groups of weights that are compared, and the share of each that is removed.

    `name`:
    None               each output row
    "N:M"              M consecutive weights of a row, of which N remain; `sparsity` is 1 - N / M
    "block"            all rows of the columns at hand
    "block-threshold"  as "block", by the rule of SparseGPT's published code: the score at the
                       sorted index ⌊size · sparsity⌋ is a threshold, and is removed itself too,
                       which is one weight more

    Elsewhere the count is ⌊size · sparsity⌋, and at a tie the weight with the lower index is
    removed. Raises `UserError` for a pattern or a sparsity that is not accepted.
    """

    name: str | None
    sparsity: float

    def __post_init__(self) -> None:
        if not 0 < self.sparsity < 1:
            raise UserError(f"sparsity {self.sparsity:g}; accepted: a share between 0 and 1")
        if self.name in (None, BLOCK, BLOCK_THRESHOLD):
            return
        if not re.fullmatch(r"[1-9]\d*:[1-9]\d*", self.name) or self._kept >= self.group:
            raise UserError(f"pattern {self.name!r}; accepted: {ACCEPTED}")
        share = 1 - self._kept / self.group
        if not math.isclose(self.sparsity, share, abs_tol=1e-6):
            raise UserError(
                f"sparsity {self.sparsity:g} with pattern {self.name}, which removes {share:g} of"
                f" the weights; accepted: {share:g}"
            )

    @property
    def in_blocks(self) -> bool:
        """Whether weights of different rows are compared."""
        return self.name in (BLOCK, BLOCK_THRESHOLD)

    @property
    def group(self) -> int:
        """M of an N:M pattern; 1 otherwise."""
        return int(self.name.partition(":")[2]) if self.name and ":" in self.name else 1

    @property
    def _kept(self) -> int:
        return int((self.name or "").partition(":")[0])

    def check(self, columns: int, what: str) -> None:
        """Raise `UserError` if the groups of an N:M pattern do not divide this many columns."""
        if columns % self.group:
            raise UserError(
                f"pattern {self.name}: {what} has {columns} columns; accepted: multiples of"
                f" {self.group}"
            )

    def removed(self, scores: Float[Array, "out columns"]) -> Bool[Array, "out columns"]:
        """Return which weights are removed, given their scores."""
        groups = scores.reshape(-1, self._size(*scores.shape))
        count = self._count(groups.shape[1])
        if self.name == BLOCK_THRESHOLD:
            return scores <= jnp.sort(scores, axis=None)[count - 1]
        return _lowest(groups, count).reshape(scores.shape)

    def count(self, rows: int, columns: int) -> int:
        """Return how many weights are removed, if no two have the same score."""
        size = self._size(rows, columns)
        return rows * columns // size * self._count(size)

    def _size(self, rows: int, columns: int) -> int:
        """Return the number of weights that are compared."""
        if self.group > 1:
            return self.group
        return rows * columns if self.in_blocks else columns

    def _count(self, size: int) -> int:
        """Return how many weights of `size` that are compared are removed."""
        if self.group > 1:
            return self.group - self._kept
        return int(size * self.sparsity) + (self.name == BLOCK_THRESHOLD)


def _lowest(scores: Float[Array, "groups size"], count: int) -> Bool[Array, "groups size"]:
    """Mark the `count` lowest scores on the last axis; at a tie those with the lower index."""
    if count == 0:
        return jnp.zeros(scores.shape, bool)
    # XLA:CPU sorts values alone in half the time of the two argsorts that would give ranks.
    threshold = jnp.sort(scores)[..., count - 1 : count]
    below, ties = scores < threshold, scores == threshold
    missing = count - jnp.sum(below, axis=-1, keepdims=True)
    return below | (ties & (jnp.cumsum(ties, axis=-1) <= missing))
