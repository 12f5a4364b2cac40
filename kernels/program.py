"""Functions and the shapes of their arguments, to test, tune, benchmark and compile."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Program(NamedTuple):
    """A function and the shapes of its arguments.

    `flops` counts the matrix products, of block-sparse matrices those of the kept blocks, without
    recomputation. `block`: the size of their blocks, None without any.
    """

    function: Callable[..., Any]
    arguments: tuple[jax.ShapeDtypeStruct, ...]
    flops: float
    block: int | None = None


def with_gradients(function: Callable[..., Any], floats: int) -> Callable[..., Any]:
    """Return a function of the value and of the gradients of the first `floats` arguments.

    The cotangent depends on the value, so that XLA cannot skip the forward pass.
    """

    def call(*arguments: Any) -> tuple[Any, ...]:
        constants = arguments[floats:]
        value, vjp = jax.vjp(lambda *operands: function(*operands, *constants), *arguments[:floats])
        return value, *vjp(jnp.sin(value))

    return call
