"""Elimination of columns from left to right (optimal brain surgeon, as in arXiv:2210.17323).

When a column is replaced, the columns to its right are changed such that the outputs change least
over the calibration inputs. Blocks of columns are changed at once behind each block.
"""

from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Result = TypeVar("Result")
Columns = Float[Array, "out width"]
Triangle = Float[Array, "width width"]


def eliminate_block(
    weight: Float[Array, "out in"],
    factor: Float[Array, "in in"],
    start: int,
    width: int,
    eliminate: Callable[[Columns, Triangle], tuple[Columns, Result]],
) -> tuple[Float[Array, "out in"], Result]:
    """Return all weights after the columns [start, start + width) are replaced, and a result.

    `factor` is the `inverse_factor` of the statistics. `eliminate` maps the columns of the block
    and their part of the factor to the errors of `eliminate_columns` and the result.
    """
    rows = jax.lax.dynamic_slice_in_dim(factor, start, width)
    triangle = jax.lax.dynamic_slice_in_dim(rows, start, width, axis=1)
    columns = jax.lax.dynamic_slice_in_dim(weight, start, width, axis=1)
    errors, result = eliminate(columns, triangle)
    # The rows of the factor are 0 to the left of the block.
    return weight - jnp.matmul(errors, rows, precision=jax.lax.Precision.HIGHEST), result


def eliminate_columns(
    columns: Columns,
    errors: Columns,
    triangle: Triangle,
    first: int | Array,
    stop: int | Array,
    new_value: Callable[[Float[Array, " out"], Array], Float[Array, " out"]],
) -> tuple[Columns, Columns]:
    """Replace the columns [first, stop) of a block; return its columns and errors.

    `new_value` maps a column, changed by those before, and its number in the block to its new
    values. The error of a column is what it changes, over its diagonal entry of the factor.
    """

    def eliminate(number: Array, carry: tuple[Columns, Columns]) -> tuple[Columns, Columns]:
        columns, errors = carry
        column = columns[:, number]
        error = (column - new_value(column, number)) / triangle[number, number]
        columns = columns - error[:, None] * triangle[number][None]
        return columns, errors.at[:, number].set(error)

    return jax.lax.fori_loop(first, stop, eliminate, (columns, errors))
