"""Changes of kept blocks during training: pure functions of block norms and gradient norms.

Arrays are `[*L, R, C]`, one entry for each block. Gradients are dense: they are known of blocks
that are not kept too.
"""

import math

import numpy as np
from jaxtyping import Bool, Float

from sat_jax.errors import UserError
from sat_jax.sparsity.block_patterns import ranks

Kept = Bool[np.ndarray, "*L R C"]
Norms = Float[np.ndarray, "*L R C"]


def drop_fraction(step: int, steps: int, initial: float) -> float:
    """Return the share of blocks to exchange at a step: a cosine from `initial` to 0 at `steps`
    (RigL, Evci et al., arXiv:1911.11134, section 3)."""
    return initial / 2 * (1 + math.cos(math.pi * min(step, steps) / steps))


def prune_grow(kept: Kept, norms: Norms, gradients: Norms, fraction: float) -> Kept:
    """Return the kept blocks after one exchange (RigL, Evci et al., arXiv:1911.11134, algorithm 1).

    In each block row, `fraction` of the kept blocks, rounded down, are dropped: those with the
    smallest norms. Equally many are added where gradients are largest; a dropped block may return.
    """
    dropped = np.floor(np.round(fraction * kept.sum(axis=-1, keepdims=True), 9))
    remaining = kept & (ranks(np.where(kept, norms, np.inf)) >= dropped)
    return _grow(remaining, gradients, dropped)


def grow_only(kept: Kept, gradients: Norms, count: int) -> Kept:
    """Return the kept blocks and those with the largest gradients, `count` in each block row.

    Raises `UserError` where a row has more already, or fewer columns.
    """
    per_row = kept.sum(axis=-1, keepdims=True)
    most, columns = per_row.max(), kept.shape[-1]
    if not most <= count <= columns:
        raise UserError(
            f"grow_only to {count} blocks in a block row; accepted: {most} to {columns}"
        )
    return _grow(kept, gradients, count - per_row)


def _grow(kept: Kept, gradients: Norms, added: np.ndarray) -> Kept:
    return kept | (ranks(np.where(kept, np.inf, -gradients)) < added)
