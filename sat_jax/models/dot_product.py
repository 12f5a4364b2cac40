"""Causal attention inside documents: one function, one backend a platform, none ignores segments."""

import functools
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

Implementation = Literal["xla", "splash", "cudnn"]

# Query rows whose scores exist at once. Keys past the chunk's end are never touched, so more chunks
# waste less of the causal triangle; matmuls of fewer rows run slower.
_CHUNK = 256
_MAX_CHUNKS = 16


def dot_product_attention(
    q_BTKGE: Float[Array, "B T K G E"],
    k_BTKE: Float[Array, "B T K E"],
    v_BTKE: Float[Array, "B T K E"],
    segment_ids: Int[Array, "B T"],
    *,
    implementation: Implementation | None = None,
) -> Float[Array, "B T K G E"]:
    """softmax(q·k / √E) v over the earlier tokens of the same document.

    A token attends to positions at or before its own whose `segment_ids` equal its own, and to
    nothing else, so that no gradient ever crosses a document's border. Softmax in float32.
    """
    return chunked_xla(q_BTKGE, k_BTKE, v_BTKE, segment_ids)


def chunked_xla(
    q_BTKGE: Float[Array, "B T K G E"],
    k_BTKE: Float[Array, "B T K E"],
    v_BTKE: Float[Array, "B T K E"],
    segment_ids: Int[Array, "B T"],
) -> Float[Array, "B T K G E"]:
    """Chunks of query rows against the keys up to each chunk's end; scores are recomputed in the
    backward pass, so that they exist for one chunk at a time."""
    length = q_BTKGE.shape[1]
    chunk = max(_CHUNK, -(-length // _MAX_CHUNKS))
    outputs = []
    for start in range(0, length, chunk):
        stop = min(start + chunk, length)
        outputs.append(
            jax.checkpoint(functools.partial(attend_chunk, start))(
                q_BTKGE[:, start:stop],
                k_BTKE[:, :stop],
                v_BTKE[:, :stop],
                segment_ids[:, start:stop],
                segment_ids[:, :stop],
            )
        )
    return jnp.concatenate(outputs, axis=1)


def attend_chunk(
    start: int | Int[Array, ""],
    q_BCKGE: Float[Array, "B C K G E"],
    k_BSKE: Float[Array, "B S K E"],
    v_BSKE: Float[Array, "B S K E"],
    query_segments: Int[Array, "B C"],
    key_segments: Int[Array, "B S"],
) -> Float[Array, "B C K G E"]:
    """Queries at positions `start, start + 1, …` against keys at positions `0, 1, …, S - 1`."""
    rows = start + jnp.arange(q_BCKGE.shape[1])
    earlier = rows[:, None] >= jnp.arange(k_BSKE.shape[1])[None, :]
    same = query_segments[:, :, None] == key_segments[:, None, :]
    visible = (earlier[None] & same)[:, None, None]
    scores = jnp.einsum("BCKGE,BSKE->BKGCS", q_BCKGE, k_BSKE, preferred_element_type=jnp.float32)
    scores = jnp.where(visible, scores * q_BCKGE.shape[-1] ** -0.5, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1).astype(v_BSKE.dtype)
    return jnp.einsum("BKGCS,BSKE->BCKGE", weights, v_BSKE)
