"""Retention in chunks, in Pallas for TPU. The grid is (rows, heads, chunks).

The memory of a head stays in VMEM from chunk to chunk. The forward pass writes the memory before
each chunk, and the backward pass reads it in reversed order, with the memory's cotangent in VMEM.

On other platforms the same programs run in interpret mode.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from kernels.derivatives import refuse_derivatives
from kernels.retention.reference import Operands, Times
from kernels.retention.xla import pad_times
from kernels.tpu import VMEM_BYTES, compiled_on_tpu, dot

NAME = "pallas_tpu"
_SUBLANES = 16  # rows of a tile of bfloat16


def refusal(dtype: jnp.dtype, key_size: int, value_size: int, chunk: int) -> str | None:
    """See `api.refusal`. Interpret mode has the same restrictions as the TPU."""
    if dtype not in (jnp.float32, jnp.bfloat16):
        return f"{dtype} arguments, accepted float32 and bfloat16"
    if chunk % _SUBLANES:
        return f"chunks of {chunk}, accepted multiples of {_SUBLANES}"
    needed = _vmem_bytes(jnp.dtype(dtype).itemsize, key_size, value_size, chunk)
    if needed > VMEM_BYTES:
        heads = f"heads of {key_size} and {value_size}"
        return f"chunks of {chunk} with {heads}, {needed} bytes of VMEM, accepted {VMEM_BYTES}"
    return None


def retention(
    operands: Operands,
    *,
    chunk: int,
) -> tuple[Float[Array, "B T H F"], Float[Array, "B H E F"]]:
    """See `api.retention`. Operands of matrix products have the dtype of the arguments."""
    *qkv, log_decay_H, memory_BHEF, times = operands
    length = operands.q_BTHE.shape[1]
    size = min(chunk, -(-length // _SUBLANES) * _SUBLANES)
    padding = ((0, 0), (0, 0), (0, -length % size), (0, 0))
    q, k, v = (jnp.pad(jnp.swapaxes(x, 1, 2), padding) for x in qkv)
    line = _line(pad_times(times, size), size)
    o_BHTF, memory = _sums(size, q, k, v, log_decay_H.astype(jnp.float32), memory_BHEF, line)
    return jnp.swapaxes(o_BHTF[:, :, :length], 1, 2), memory


class _Line(NamedTuple):
    """Documents and times of N chunks. `ends`: document and time before each chunk, then those at
    its end."""

    document: Int[Array, "B N 1 C"]
    time: Int[Array, "B N 1 C"]
    ends: Int[Array, "4 BN"]


def _line(times: Times, size: int) -> _Line:
    batch = times.time.shape[0]
    after = [x[:, size - 1 :: size] for x in (times.latest, times.time)]
    before = [jnp.pad(x[:, :-1], ((0, 0), (1, 0))) for x in after]
    shape = (batch, -1, 1, size)
    ends = jnp.stack([x.reshape(-1) for x in (*before, *after)])
    return _Line(times.document.reshape(shape), times.time.reshape(shape), ends)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sums(
    size: int,
    q: Float[Array, "B H T E"],
    k: Float[Array, "B H T E"],
    v: Float[Array, "B H T F"],
    log_decay_H: Float[Array, " H"],
    memory: Float[Array, "B H E F"],
    line: _Line,
) -> tuple[Float[Array, "B H T F"], Float[Array, "B H E F"]]:
    """Return the sums of chunks of `size` tokens, and the memory after the last."""
    o, after = _forward(size, q, k, v, log_decay_H, memory, line, save=False)
    return o, after


def _sums_forward(
    size: int, q: Array, k: Array, v: Array, log_decay_H: Array, memory: Array, line: _Line
) -> tuple[tuple[Array, Array], Any]:
    reason = "gradients of pallas_tpu cannot be differentiated again; accepted: xla"
    q, k, v, memory = refuse_derivatives((q, k, v, memory), reason)
    o, after, memories = _forward(size, q, k, v, log_decay_H, memory, line, save=True)
    return (o, after), (q, k, v, log_decay_H, memories, line)


def _sums_backward(size: int, saved: Any, cotangents: tuple[Array, Array]) -> tuple[Any, ...]:
    q, k, v, log_decay_H, memories, line = saved
    dq, dk, dv, d_memory = _backward(size, q, k, v, log_decay_H, memories, line, *cotangents)
    return dq, dk, dv, None, d_memory, None


_sums.defvjp(_sums_forward, _sums_backward)


def _forward(
    size: int,
    q: Array,
    k: Array,
    v: Array,
    log_decay_H: Array,
    memory: Array,
    line: _Line,
    *,
    save: bool,
) -> tuple[Array, ...]:
    """Return sums, the memory after the last chunk and, with `save`, those before all chunks."""
    specs = _Specs(size, q.shape[2] // size)
    values = jax.ShapeDtypeStruct(v.shape, jnp.float32)
    outputs = [(specs.tokens(v), values), (specs.head(memory), memory)]
    if save:
        shape = (*memory.shape[:2], specs.chunks, *memory.shape[2:])
        memories = jax.ShapeDtypeStruct(shape, jnp.float32)
        outputs.append((specs.chunk(memories), memories))
    in_specs = [*map(specs.tokens, (q, k, v)), *specs.line(line), specs.head(memory)]
    call = _call(_forward_kernel, "retention", specs, q, in_specs, outputs, memory.shape[2:])
    result: tuple[Array, ...] = call(
        log_decay_H, line.ends, q, k, v, line.document, line.time, memory
    )
    return result


def _forward_kernel(*refs: Any) -> None:
    log_decay, ends, q, k, v, document, time, before, o, after, *memories, memory = refs
    n, last = pl.program_id(2), pl.num_programs(2) - 1

    @pl.when(n == 0)
    def _() -> None:
        memory[...] = before[...]

    for saved in memories:
        saved[...] = memory[...]
    decays = _decays(log_decay, ends, document, time, n)
    dtype = q.dtype
    weights = dot(q[...], k[...], 1, 1) * decays.within
    past = dot(q[...], memory[...].astype(dtype), 1, 0)
    o[...] = dot(weights.astype(dtype), v[...], 1, 0) + decays.since_before * past
    keys = (k[...] * decays.until_after).astype(dtype)
    memory[...] = decays.before_to_after * memory[...] + dot(keys, v[...], 0, 0)

    @pl.when(n == last)
    def _() -> None:
        after[...] = memory[...]


def _backward(
    size: int,
    q: Array,
    k: Array,
    v: Array,
    log_decay_H: Array,
    memories: Array,
    line: _Line,
    d_o: Array,
    d_after: Array,
) -> tuple[Array, ...]:
    """Return the gradients of q, k, v and of the memory before the first chunk."""
    specs = _Specs(size, q.shape[2] // size, reverse=True)
    outputs = [*((specs.tokens(x), x) for x in (q, k, v)), (specs.head(d_after), d_after)]
    in_specs = [*map(specs.tokens, (q, k, v)), *specs.line(line), specs.chunk(memories)]
    in_specs += [specs.tokens(d_o), specs.head(d_after)]
    name, shape = "retention_gradients", d_after.shape[2:]
    call = _call(_backward_kernel, name, specs, q, in_specs, outputs, shape)
    arrays = (q, k, v, line.document, line.time, memories, d_o, d_after)
    result: tuple[Array, ...] = call(log_decay_H, line.ends, *arrays)
    return result


def _backward_kernel(*refs: Any) -> None:
    log_decay, ends, q, k, v, document, time, memory, d_o, d_after = refs[:10]
    dq, dk, dv, d_before, d_memory = refs[10:]
    step, last = pl.program_id(2), pl.num_programs(2) - 1

    @pl.when(step == 0)
    def _() -> None:
        d_memory[...] = d_after[...]

    decays = _decays(log_decay, ends, document, time, last - step)
    dtype = q.dtype
    d_sums, d_later, past = (x[...].astype(dtype) for x in (d_o, d_memory, memory))
    weights = (dot(q[...], k[...], 1, 1) * decays.within).astype(dtype)
    d_scores = (dot(d_sums, v[...], 1, 1) * decays.within).astype(dtype)
    d_query = dot(d_scores, k[...], 1, 0) + decays.since_before * dot(d_sums, past, 1, 1)
    d_key = dot(d_scores, q[...], 0, 0) + decays.until_after * dot(v[...], d_later, 1, 1)
    d_value = dot(weights, d_sums, 0, 0) + decays.until_after * dot(k[...], d_later, 1, 0)
    for gradient, value in ((dq, d_query), (dk, d_key), (dv, d_value)):
        gradient[...] = value.astype(gradient.dtype)
    queries = (q[...] * decays.since_before).astype(dtype)
    d_memory[...] = decays.before_to_after * d_memory[...] + dot(queries, d_sums, 0, 0)

    @pl.when(step == last)
    def _() -> None:
        d_before[...] = d_memory[...]


class _Decays(NamedTuple):
    """Powers of the decay: of pairs of tokens within a chunk, since the memory before it, until the
    memory after it, and from one memory to the other."""

    within: Float[Array, "C C"]
    since_before: Float[Array, "C 1"]
    until_after: Float[Array, "C 1"]
    before_to_after: Float[Array, "1 1"]


def _decays(log_decay: Any, ends: Any, document: Any, time: Any, n: Array) -> _Decays:
    """Return the decays of chunk n of the current row and head."""
    rate = log_decay[pl.program_id(1)]
    index = pl.program_id(0) * pl.num_programs(2) + n
    document_before, time_before, document_after, time_after = (ends[i, index] for i in range(4))
    size = time.shape[-1]
    document_s, time_s = document[...], time[...]
    document_t, time_t = (x.reshape(size, 1) for x in (document_s, time_s))

    def powers(steps: Array, valid: Array) -> Array:
        return jnp.exp(jnp.where(valid, steps.astype(jnp.float32) * rate, -jnp.inf))

    t, s = (jax.lax.broadcasted_iota(jnp.int32, (size, size), axis) for axis in (0, 1))
    passed = jnp.full((1, 1), time_after - time_before)
    return _Decays(
        powers(time_t - time_s, (document_t == document_s) & (t >= s)),
        powers(time_t - time_before, document_t == document_before),
        powers(time_after - time_t, document_t == document_after),
        powers(passed, jnp.full((1, 1), document_after == document_before)),
    )


class _Specs(NamedTuple):
    """Blocks of the arrays at grid index (row, head, step), `size` tokens in each of the chunks,
    which are in reversed order with `reverse`."""

    size: int
    chunks: int
    reverse: bool = False

    def tokens(self, x: Any) -> pl.BlockSpec:
        """Return the spec of a chunk of `[B, H, T, ·]`."""
        return self._spec((None, None, self.size, x.shape[3]), lambda b, h, n: (b, h, n, 0))

    def line(self, line: _Line) -> list[pl.BlockSpec]:
        """Return the specs of a chunk of `document` and of `time`."""
        spec = self._spec((None, None, 1, self.size), lambda b, _, n: (b, n, 0, 0))
        return [spec] * len((line.document, line.time))

    def head(self, x: Any) -> pl.BlockSpec:
        """Return the spec of a head of `[B, H, E, F]`."""
        return self._spec((None, None, *x.shape[2:]), lambda b, h, _: (b, h, 0, 0))

    def chunk(self, x: Any) -> pl.BlockSpec:
        """Return the spec of a chunk of a head of `[B, H, N, E, F]`."""
        return self._spec((None, None, None, *x.shape[3:]), lambda b, h, n: (b, h, n, 0, 0))

    def _spec(self, block: tuple[int | None, ...], index: Callable[..., Any]) -> pl.BlockSpec:
        def in_order(b: Any, h: Any, step: Any, *_: Any) -> Any:
            return index(b, h, self.chunks - 1 - step if self.reverse else step)

        return pl.BlockSpec(block, in_order)


def _call(
    kernel: Callable[..., None],
    name: str,
    specs: _Specs,
    q: Array,
    in_specs: Sequence[pl.BlockSpec],
    outputs: Sequence[tuple[pl.BlockSpec, Any]],
    memory_shape: tuple[int, ...],
) -> Callable[..., Any]:
    """Return the call of a kernel with one memory in VMEM, which lasts for all chunks of a head."""

    def call(*arrays: Array, interpret: bool) -> Any:
        return pl.pallas_call(
            kernel,
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=2,
                grid=(*q.shape[:2], specs.chunks),
                in_specs=in_specs,
                out_specs=[spec for spec, _ in outputs],
                scratch_shapes=[pltpu.VMEM(memory_shape, jnp.float32)],
            ),
            out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for _, x in outputs],
            interpret=interpret,
            name=name,
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel", "parallel", "arbitrary"),
                vmem_limit_bytes=VMEM_BYTES,
            ),
        )(*arrays)

    return compiled_on_tpu(call)


def _vmem_bytes(item_bytes: int, key_size: int, value_size: int, chunk: int) -> int:
    """Return the memory of the backward pass: blocks in two buffers, and intermediate results."""
    key, value, chunk = (math.ceil(x / 128) * 128 for x in (key_size, value_size, chunk))
    tokens = 2 * chunk * (2 * (2 * key + value) * item_bytes + 4 * value)
    memories = 4 * key * value * (2 * 3 + 1)
    intermediate = 4 * chunk * (4 * chunk + 2 * (2 * key + value))
    return tokens + memories + intermediate
