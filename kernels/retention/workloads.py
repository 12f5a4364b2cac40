"""Programs at the sizes of RetNet-1.3B, as argument shapes: to test, measure and compile."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kernels.program import Program, with_gradients
from kernels.retention.api import retention
from kernels.retention.reference import Operands, Times


class Workload(NamedTuple):
    """Retention of one layer: rows of `length` tokens of one document each."""

    rows: int
    length: int
    heads: int
    key_size: int
    value_size: int
    chunk: int


RETNET_1_3B = Workload(8, 2048, 8, 256, 432, 512)


def programs(workload: Workload, implementation: str, dtype: str) -> dict[str, Program]:
    """Return retention, and retention with the gradients of queries, keys and values, by name."""
    rows, length, heads, key_size, value_size, chunk = workload

    def arrays(size: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((rows, length, heads, size), dtype)

    # q · k and weights · v of half of the pairs in a chunk, the memory's update and its product
    # with q.
    pairs = 2 * (key_size + value_size) * (chunk + 1) / 2
    flops = rows * length * heads * (pairs + 4 * key_size * value_size)
    arguments = (arrays(key_size), arrays(key_size), arrays(value_size))
    function = functools.partial(_retain, chunk=chunk, implementation=implementation)
    return {
        "retention": Program(function, arguments, flops),
        "retention_gradients": Program(with_gradients(function, 3), arguments, 3 * flops),
    }


def _retain(q: Any, k: Any, v: Any, **options: Any) -> jax.Array:
    (rows, length, heads, key_size), value_size = q.shape, v.shape[-1]
    log_decay = jnp.asarray(np.log1p(-(2.0 ** (-5 - np.arange(heads)))), jnp.float32)
    memory = jnp.zeros((rows, heads, key_size, value_size), jnp.float32)
    time = jnp.broadcast_to(jnp.arange(1, length + 1, dtype=jnp.int32)[None], (rows, length))
    times = Times(jnp.ones_like(time), jnp.ones_like(time), time)
    return retention(Operands(q, k, v, log_decay, memory, times), **options)[0]
