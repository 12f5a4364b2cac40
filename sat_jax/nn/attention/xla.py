"""Blocked attention in XLA, for every platform.

The forward pass uses an online softmax over blocks of keys (Milakov and Gimelshein,
arXiv:1805.02867). The backward pass recomputes the weights from the log-sum-exp of each query (Dao
et al., arXiv:2205.14135). Only the scores of one pair of blocks are in memory at a time. Both
passes loop over the pairs with visible keys: those of the lower triangle that share a document. On
a CPU the scores of a block stay in the cache. Queries may be a part of the row of their keys.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from sat_jax.nn.attention.documents import pad_rows
from sat_jax.nn.inner import inner

# Tokens per block. Measured on two CPU cores with 9 heads of 64, forward and backward pass: in rows
# of one document of 1,024 and 2,048 tokens 256 takes 0.77 and 0.65 of the time of 128, whose
# products use one core; 512 is up to a third slower.
BLOCK = 256

_LOWEST = float(jnp.finfo(jnp.float32).min)

_dot = functools.partial(jax.lax.dot_general, preferred_element_type=jnp.float32)
# Matrix products within each row and KV group.
_NN = (((3,), (2,)), ((0, 1), (0, 1)))
_NT = (((3,), (3,)), ((0, 1), (0, 1)))


class Blocks(NamedTuple):
    """N blocks of C queries, and M blocks of C keys. R = G·C: the queries of all heads of a
    group."""

    q: Float[Array, "N B K R E"]
    k: Float[Array, "M B K C E"]
    v: Float[Array, "M B K C E"]


class Places(NamedTuple):
    """The documents of queries and keys, and the position of the first query in the row of keys."""

    queries: Int[Array, "N B C"]
    keys: Int[Array, "M B C"]
    start: Int[Array, ""]


def attend(
    q_BTKGE: Float[Array, "B T K G E"],
    k_BSKE: Float[Array, "B S K E"],
    v_BSKE: Float[Array, "B S K E"],
    documents: Int[Array, "B S"],
    start: int | Int[Array, ""] = 0,
) -> Float[Array, "B T K G E"]:
    """Return causal attention within documents, as numbered by `number_documents`, of queries at
    positions `start, start + 1, …` to keys at `0, 1, …, S - 1`."""
    batch, length, groups, heads, size = q_BTKGE.shape
    count = -(-length // BLOCK)
    block = -(-length // count)
    query_documents = jax.lax.dynamic_slice_in_dim(documents, start, length, axis=1)
    query_documents, q = pad_rows(block, query_documents, q_BTKGE)
    documents, *kv = pad_rows(block, documents, k_BSKE, v_BSKE)
    q = q.reshape(batch, count, block, groups, heads, size).transpose(1, 0, 3, 4, 2, 5)
    k, v = (x.reshape(batch, -1, block, groups, size).transpose(1, 0, 3, 2, 4) for x in kv)
    query_documents, documents = (
        x.reshape(batch, -1, block).swapaxes(0, 1) for x in (query_documents, documents)
    )
    o = _attend_blocks(
        Blocks(q.reshape(count, batch, groups, heads * block, size), k, v),
        Places(query_documents, documents, jnp.asarray(start, jnp.int32)),
    )
    o = o.reshape(count, batch, groups, heads, block, size).transpose(1, 0, 4, 2, 3, 5)
    return o.reshape(batch, count * block, groups, heads, size)[:, :length]


@jax.custom_vjp
def _attend_blocks(blocks: Blocks, places: Places) -> Float[Array, "N B K R E"]:
    return _forward(blocks, places)[0]


def _forward(blocks: Blocks, places: Places) -> tuple[Float[Array, "N B K R E"], Any]:
    def query_block(i: Int[Array, ""]) -> tuple[Array, Array]:
        q = _take(blocks.q, i)

        def add_key_block(j: Int[Array, ""], sums: tuple[Array, ...]) -> tuple[Array, ...]:
            mix, highest, total = sums
            v = _take(blocks.v, j)
            scores = _scores(q, _take(blocks.k, j), _visible(places, i, j))
            new_highest = jnp.maximum(highest, scores.max(axis=-1, keepdims=True))
            weights = jnp.exp(scores - new_highest)
            shrink = jnp.exp(highest - new_highest)
            mix = mix * shrink + _dot(weights.astype(v.dtype), v, _NN)
            return mix, new_highest, total * shrink + weights.sum(axis=-1, keepdims=True)

        zeros = jnp.zeros(q.shape, jnp.float32)
        # Finite, so that scores of -inf have weight 0 and not NaN.
        lowest = jnp.full_like(zeros[..., :1], _LOWEST)
        sums = (zeros, lowest, jnp.zeros_like(lowest))
        mix, highest, total = jax.lax.fori_loop(first[i], end[i], add_key_block, sums)
        return (mix / total).astype(q.dtype), highest + jnp.log(total)

    first, end = _visible_blocks(places)
    o, log_total = jax.lax.map(query_block, jnp.arange(len(first)))
    return o, (blocks, places, o, log_total)


def _backward(saved: Any, do: Float[Array, "N B K R E"]) -> tuple[Blocks, None]:
    blocks, places, o, log_total = saved
    mean = inner(o, do)[..., None]
    scale = o.shape[-1] ** -0.5
    # Transposed once, not in each product: on XLA:CPU products with a transposed left operand are
    # slower, whether q or the scores are on the left.
    q_t, do_t = blocks.q.swapaxes(-1, -2), do.swapaxes(-1, -2)

    def query_block(
        dk_dv: tuple[Array, Array], i: Int[Array, ""]
    ) -> tuple[tuple[Array, Array], Array]:
        q, do_i, mean_i, log_total_i = (_take(x, i) for x in (blocks.q, do, mean, log_total))
        q_t_i, do_t_i = _take(q_t, i), _take(do_t, i)

        def add_key_block(j: Int[Array, ""], sums: tuple[Array, ...]) -> tuple[Array, ...]:
            dq, dk, dv = sums
            k, v = _take(blocks.k, j), _take(blocks.v, j)
            weights = jnp.exp(_scores(q, k, _visible(places, i, j)) - log_total_i)
            dweights = _dot(do_i, v, _NT)
            dscores = (weights * (dweights - mean_i) * scale).astype(q.dtype)
            dq += _dot(dscores, k, _NN)
            dk = _add_at(dk, j, _dot(q_t_i, dscores, _NN))
            dv = _add_at(dv, j, _dot(do_t_i, weights.astype(do_i.dtype), _NN))
            return dq, dk, dv

        zeros = jnp.zeros(q.shape, jnp.float32)
        dq, dk, dv = jax.lax.fori_loop(first[i], end[i], add_key_block, (zeros, *dk_dv))
        return (dk, dv), dq.astype(q.dtype)

    first, end = _visible_blocks(places)
    # Gradients of keys and values are transposed, [N, B, K, E, C].
    zeros = jnp.zeros(blocks.k.swapaxes(-1, -2).shape, jnp.float32)
    (dk, dv), dq = jax.lax.scan(query_block, (zeros, zeros), jnp.arange(len(first)))
    dk, dv = (x.swapaxes(-1, -2).astype(blocks.k.dtype) for x in (dk, dv))
    return Blocks(dq, dk, dv), None


_attend_blocks.defvjp(_forward, _backward)


def _scores(
    q: Float[Array, "B K R E"], k: Float[Array, "B K C E"], visible: Bool[Array, "B C C"]
) -> Float[Array, "B K R C"]:
    """Return q·k / √E in float32, -inf where the key is not visible."""
    scores = _dot(q, k, _NT) * q.shape[-1] ** -0.5
    by_head = scores.reshape(*scores.shape[:2], -1, *visible.shape[1:])
    return jnp.where(visible[:, None, None], by_head, -jnp.inf).reshape(scores.shape)


def _visible(places: Places, i: Int[Array, ""], j: Int[Array, ""]) -> Bool[Array, "B C C"]:
    """Return which keys of block j are visible to the queries of block i."""
    block = places.keys.shape[-1]
    offsets = jnp.arange(block)
    queries = places.start + i * block + offsets
    earlier = queries[:, None] >= (j * block + offsets)[None, :]
    same = _take(places.queries, i)[:, :, None] == _take(places.keys, j)[:, None, :]
    return earlier[None] & same


def _visible_blocks(places: Places) -> tuple[Int[Array, " N"], Int[Array, " N"]]:
    """Return for each block of queries the first block with a visible key, in any row, and the
    block after the last one."""
    begins, ends = places.queries[:, :, 0], places.keys[:, :, -1]
    earlier = jnp.all(ends[None, :, :] < begins[:, None, :], axis=-1)
    number, _, block = places.queries.shape
    last = (places.start + jnp.arange(1, number + 1) * block - 1) // block
    return jnp.sum(earlier, axis=1, dtype=jnp.int32), jnp.minimum(last + 1, len(places.keys))


def _take(x: Array, index: Int[Array, ""]) -> Array:
    return jax.lax.dynamic_index_in_dim(x, index, axis=0, keepdims=False)


def _add_at(x: Array, index: Int[Array, ""], added: Array) -> Array:
    return jax.lax.dynamic_update_index_in_dim(x, _take(x, index) + added, index, axis=0)
