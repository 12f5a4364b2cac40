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

    `fraction` of the kept blocks of the layer, rounded down, are dropped: those with the smallest
    norms. Each block row gets as many as it lost where gradients are largest; a dropped block may
    return.
    """
    dropped = math.floor(round(fraction * kept.sum(), 9))
    smallest_first = np.where(kept, norms, np.inf).argsort(axis=None, kind="stable")
    remaining = kept.copy()
    remaining.flat[smallest_first[:dropped]] = False
    return fill(remaining, gradients, counts)
