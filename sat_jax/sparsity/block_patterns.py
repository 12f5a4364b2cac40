"""Patterns of kept blocks: bool arrays `[R, C]` for a matrix `[R · block, C · block]`.

Every block row keeps the same number of blocks, so that the work is balanced.
"""

import math
import zlib
from collections.abc import Mapping

import numpy as np
from jaxtyping import Bool, Float

from sat_jax.errors import UserError

PATTERNS = ("random", "magnitude", "erk", "butterfly")
Grid = tuple[int, int]
"""Numbers of block rows R and of block columns C."""
Kept = Bool[np.ndarray, "R C"]
Magnitudes = Float[np.ndarray, "R C"]
"""Mean absolute value of each block."""


def block_grid(name: str, rows: int, columns: int, block: int) -> Grid:
    """Return the grid of square blocks of a matrix `[rows, columns]`. Raises `UserError` for a
    block that does not divide both or is no multiple of 8, which kernels need."""
    if block < 8 or block % 8 or rows % block or columns % block:
        common = math.gcd(rows, columns)
        accepted = [str(b) for b in range(8, common + 1, 8) if common % b == 0]
        raise UserError(
            f"block {block} of {name} [{rows}, {columns}];"
            f" accepted: {', '.join(accepted) or 'none: no multiple of 8 divides both'}"
        )
    return rows // block, columns // block


def block_magnitudes(
    name: str, array: Float[np.ndarray, "L *units D"], block: int
) -> Float[np.ndarray, "L R C"]:
    """Return the mean absolute value of each block; raises as `block_grid` does."""
    layers, *units, width = array.shape
    rows, columns = block_grid(name, math.prod(units), width, block)
    return np.abs(array.reshape(layers, rows, block, columns, block)).mean(axis=(2, 4))


def blocks_per_row(name: str, density: float, columns: int, multiple: int = 1) -> int:
    """Return the multiple of `multiple` nearest to `density · columns`, halves round up. Raises
    `UserError` for a density above 1 or one that leaves a block row without a block."""
    count = multiple * math.floor(round(density * columns / multiple, 9) + 0.5)
    if not 0 < count <= columns:
        raise UserError(
            f"density {density:g} keeps {count} of the {columns} blocks in a block row of {name};"
            f" accepted: {multiple / (2 * columns):g} to 1"
        )
    return count


def random(grid: Grid, count: int, rng: np.random.Generator) -> Kept:
    """Return `count` random blocks in each block row, and equally many in each block column.

    Each row draws among the columns with the fewest blocks so far. Raises `UserError` where C does
    not divide R · count.
    """
    rows, columns = grid
    step = column_multiple(grid)
    if count % step:
        raise UserError(
            f"pattern 'random' with {count} of {columns} blocks in each of {rows} block rows has"
            f" unequal block columns; accepted: multiples of {step}"
        )
    kept = np.zeros(grid, bool)
    for row in rng.permutation(rows):
        fewest = np.lexsort((rng.random(columns), kept.sum(axis=0)))
        kept[row, fewest[:count]] = True
    return kept


def column_multiple(grid: Grid) -> int:
    """Return the number whose multiples, as blocks per row, can be equally many per column."""
    return grid[1] // math.gcd(*grid)


def magnitude(magnitudes: Float[np.ndarray, "*L R C"], count: int) -> Bool[np.ndarray, "*L R C"]:
    """Return the `count` blocks of each block row with the largest magnitudes, the first of
    equals."""
    return ranks(-magnitudes) < count


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


def static_blocks(
    pattern: str, magnitudes: Mapping[str, Float[np.ndarray, "L R C"]], density: float, seed: int
) -> dict[str, Bool[np.ndarray, "L R C"]]:
    """Return the kept blocks of each matrix by path, equally many in all its layers.

    `pattern`: `random`, `magnitude`, `butterfly`, or `erk`, random blocks with the densities of
    `erk` and counts rounded to what `random` accepts. What is drawn depends on seed, path and
    layer. Raises `UserError` for an unknown pattern, and counts that the pattern does not accept.
    """
    if pattern not in PATTERNS:
        raise UserError(f"pattern {pattern!r}; accepted: {', '.join(PATTERNS)}")
    grids = {path: _grid(layers[0]) for path, layers in magnitudes.items()}
    densities = erk(grids, density) if pattern == "erk" else dict.fromkeys(grids, density)
    kept = {}
    for path, layers in magnitudes.items():
        multiple = column_multiple(grids[path]) if pattern == "erk" else 1
        count = blocks_per_row(path, densities[path], grids[path][1], multiple)
        purpose = zlib.crc32(path.encode())
        kept[path] = np.stack(
            [
                _blocks(pattern, layer, count, np.random.default_rng((seed, purpose, number)))
                for number, layer in enumerate(layers)
            ]
        )
    return kept


def ranks(values: Float[np.ndarray, "*L C"]) -> np.ndarray:
    """Return the rank of each value along the last axis, 0 for the smallest, the first of equals
    first."""
    return values.argsort(axis=-1, kind="stable").argsort(axis=-1)


def _blocks(pattern: str, magnitudes: Magnitudes, count: int, rng: np.random.Generator) -> Kept:
    if pattern == "magnitude":
        return magnitude(magnitudes, count)
    if pattern == "butterfly":
        return butterfly(_grid(magnitudes), count)
    return random(_grid(magnitudes), count, rng)


def _grid(magnitudes: Magnitudes) -> Grid:
    rows, columns = magnitudes.shape
    return rows, columns
