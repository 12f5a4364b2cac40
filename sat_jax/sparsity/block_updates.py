"""Changes of kept blocks during training: pure functions of block norms and gradient norms.

Arrays are `[R, C]`, one entry for each block of a layer. Gradients are dense: they are known of
blocks that are not kept too.
"""

import math

import numpy as np
from jaxtyping import Bool, Float

from sat_jax.sparsity.block_patterns import BlockCounts, fill

Kept = Bool[np.ndarray, "R C"]
Norms = Float[np.ndarray, "R C"]


def drop_fraction(step: int, steps: int, initial: float) -> float:
    """Return the share of blocks to exchange at a step: a cosine from `initial` to 0 at `steps`
    (RigL, Evci et al., arXiv:1911.11134, section 3)."""
    return initial / 2 * (1 + math.cos(math.pi * min(step, steps) / steps))


def prune_grow(
    kept: Kept, norms: Norms, gradients: Norms, fraction: float, counts: BlockCounts
) -> Kept:
    """Return the kept blocks after one exchange (RigL, Evci et al., arXiv:1911.11134, algorithm 1).

    In each block row, `fraction` of the kept blocks, rounded down, are dropped: those with the
    smallest norms. Equally many are added where gradients are largest; a dropped block may return.
    """
    dropped = np.floor(np.round(fraction * kept.sum(axis=-1, keepdims=True), 9))
    smallest_first = np.where(kept, norms, np.inf).argsort(axis=-1, kind="stable")
    remaining = kept & (smallest_first.argsort(axis=-1) >= dropped)
    return fill(remaining, gradients, counts)
