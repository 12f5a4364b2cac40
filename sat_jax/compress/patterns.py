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
        if self.group > 1:
            groups = scores.reshape(len(scores), -1, self.group)
            return _lowest(groups, self.group - self._kept).reshape(scores.shape)
        if not self.in_blocks:
            return _lowest(scores, int(scores.shape[1] * self.sparsity))
        count = int(scores.size * self.sparsity)
        if self.name == BLOCK:
            return _lowest(scores.reshape(-1), count).reshape(scores.shape)
        return scores <= jnp.sort(scores, axis=None)[count]


def _lowest(scores: Float[Array, "*lead size"], count: int) -> Bool[Array, "*lead size"]:
    """Mark the `count` lowest scores on the last axis."""
    return jnp.argsort(jnp.argsort(scores)) < count
