"""Patterns of kept blocks: bool arrays `[R, C]` for a matrix `[R · block, C · block]`.

Every block row keeps the same number of blocks, and no block column more than a limit, so that the
work is balanced and all patterns of a matrix have arrays of the same shapes.
"""

import dataclasses
import math
import zlib
from collections.abc import Mapping
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float

from sat_jax.errors import UserError

Pattern = Literal["random", "magnitude", "erk", "butterfly"]
Grid = tuple[int, int]
"""Numbers of block rows R and of block columns C."""
Kept = Bool[np.ndarray, "R C"]
Norms = Float[np.ndarray, "R C"]

_UNEVEN = 1.5  # the most blocks in a block column over their mean, of patterns that follow norms


@dataclasses.dataclass(frozen=True)
class BlockCounts:
    """How many blocks a matrix stores in each layer: `per_row` in each block row of `grid`, and at
    most `longest` in a block column. Hashable; static under jit."""

    grid: Grid
    block: int
    per_row: int
    longest: int

    @property
    def nonzero(self) -> int:
        """Number of stored blocks."""
        return self.grid[0] * self.per_row

    @property
    def density(self) -> float:
        """Share of the blocks that are stored."""
        return self.per_row / self.grid[1]


def block_grid(name: str, rows: int, columns: int, block: int) -> Grid:
    """Return the grid of square blocks of a matrix `[rows, columns]`. Raises `UserError` for a
    block that does not divide both or is no multiple of 8, which kernels need."""
    if block < 8 or block % 8 or rows % block or columns % block:
        common = math.gcd(rows, columns)
        accepted = [str(b) for b in range(8, common + 1, 8) if common % b == 0]
        raise UserError(
            f"sparsity.weights.block {block} does not divide {name} [{rows}, {columns}], or is no"
            f" multiple of 8; accepted: {', '.join(accepted) or 'none'}"
        )
    return rows // block, columns // block


def block_counts(
    pattern: Pattern,
    grids: Mapping[str, Grid],
    block: int,
    density: float,
    *,
    grown: bool = False,
    exchanged: bool = False,
) -> dict[str, BlockCounts]:
    """Return how many blocks each matrix stores, nearest to one density of all.

    `grown`: blocks were added to the first pattern; `exchanged`: blocks will be exchanged. Both
    follow norms, as `magnitude` does, and then block columns are limited less strictly. Raises
    `UserError` for counts that the pattern does not accept.
    """
    densities = erk(grids, density) if pattern == "erk" else dict.fromkeys(grids, density)
    counts = {}
    for path, (rows, columns) in grids.items():
        count = blocks_per_row(path, densities[path], columns)
        if pattern == "butterfly" and not grown:
            butterfly((rows, columns), count)  # raises for other counts
        longest = math.ceil(rows * count / columns)
        if grown or exchanged or pattern == "magnitude":
            # In a dense third or more of a matrix no limit can be guaranteed.
            few = 3 * count <= columns
            longest = min(rows, math.ceil(_UNEVEN * rows * count / columns)) if few else rows
        counts[path] = BlockCounts((rows, columns), block, count, longest)
    return counts


def blocks_per_row(name: str, density: float, columns: int) -> int:
    """Return the number nearest to `density · columns`, halves round up. Raises `UserError` for a
    density above 1 or one that leaves a block row without a block."""
    count = math.floor(round(density * columns, 9) + 0.5)
    if not 0 < count <= columns:
        raise UserError(
            f"density {density:g} keeps {count} of the {columns} blocks in a block row of {name};"
            f" accepted: {1 / (2 * columns):g} to 1"
        )
    return count


def initial_blocks(
    pattern: Pattern, path: str, counts: BlockCounts, norms: Float[np.ndarray, "L R C"], seed: int
) -> Bool[np.ndarray, "L R C"]:
    """Return the kept blocks of the matrix at `path` in each layer.

    `random` and `erk` draw blocks from seed, path and layer; `magnitude` follows the norms.
    """
    purpose = zlib.crc32(path.encode())
    layers = []
    for number, layer in enumerate(norms):
        if pattern == "butterfly":
            layers.append(butterfly(counts.grid, counts.per_row))
        elif pattern == "magnitude":
            layers.append(fill(np.zeros(counts.grid, bool), layer, counts))
        else:
            layers.append(random(counts, np.random.default_rng((seed, purpose, number))))
    return np.stack(layers)


def random(counts: BlockCounts, rng: np.random.Generator) -> Kept:
    """Return random blocks, equally many in each block row; numbers in block columns differ by at
    most one.

    Each row draws among the columns with the fewest blocks so far.
    """
    rows, columns = counts.grid
    kept = np.zeros(counts.grid, bool)
    for row in rng.permutation(rows):
        fewest = np.lexsort((rng.random(columns), kept.sum(axis=0)))
        kept[row, fewest[: counts.per_row]] = True
    return kept


def fill(kept: Kept, scores: Norms, counts: BlockCounts) -> Kept:
    """Return the kept blocks and those with the highest scores, the first of equals first, up to
    the counts: `per_row` in each block row, and `longest` in each block column."""
    kept = kept.copy()
    in_row, in_column = kept.sum(axis=1), kept.sum(axis=0)
    order = np.argsort(-scores, axis=None, kind="stable")
    for row, column in zip(*np.unravel_index(order, kept.shape), strict=True):
        free = in_row[row] < counts.per_row and in_column[column] < counts.longest
        if free and not kept[row, column]:
            kept[row, column] = True
            in_row[row] += 1
            in_column[column] += 1
    assert (in_row == counts.per_row).all(), "the limit of block columns leaves a row short"
    return kept


def butterfly(grid: Grid, count: int) -> Kept:
    """Return a flat block butterfly with `count` blocks in each block row (Pixelfly, Chen et al.,
    arXiv:2112.00029, section 3).

    The sum of the butterfly factors of strides 1, 2, ..., 2^(m - 1) of size n, a power of 2, keeps
    (i, i) and (i, i ± stride). It is stretched to the grid by repeating each entry R/n by C/n
    times, with the largest n that gives `count`. Raises `UserError` for other counts.
    """
    rows, columns = grid
    sizes: dict[int, tuple[int, int]] = {}
    for power in range(1, math.gcd(*grid).bit_length()):
        size = 2**power
        if math.gcd(*grid) % size == 0:
            sizes |= {(1 + m) * columns // size: (size, m) for m in range(1, power + 1)}
    if count not in sizes:
        accepted = ", ".join(map(str, sorted(sizes)))
        raise UserError(
            f"pattern 'butterfly' with {count} blocks in a block row of a grid {rows} × {columns};"
            f" accepted: {accepted or 'none: the grid has an odd side'}"
        )
    size, factors = sizes[count]
    index = np.arange(size)
    distance = index[:, None] ^ index
    kept = np.isin(distance, [0, *(2**m for m in range(factors))])
    return kept.repeat(rows // size, axis=0).repeat(columns // size, axis=1)


def erk(grids: Mapping[str, Grid], density: float) -> dict[str, float]:
    """Return a density for each matrix, proportional to (R + C) / (R · C), for one density of all
    (Erdős–Rényi kernel, Evci et al., arXiv:1911.11134, section 3).

    Matrices whose density would be above 1 are dense, and the others share what is left.
    """
    blocks = {name: math.prod(grid) for name, grid in grids.items()}
    dense: set[str] = set()
    while True:
        sparse = [name for name in grids if name not in dense]
        budget = density * sum(blocks.values()) - sum(blocks[name] for name in dense)
        factor = budget / max(sum(sum(grids[name]) for name in sparse), 1)
        densities = dict.fromkeys(grids, 1.0)
        densities |= {name: factor * sum(grids[name]) / blocks[name] for name in sparse}
        above = {name for name in sparse if densities[name] > 1}
        if not above:
            return densities
        dense |= above
