"""Attention on TPUs by the splash kernel of jax (`jax.experimental.pallas.ops.tpu`)."""

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel as splash_kernel,
)
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as splash_mask
from jaxtyping import Array, Float, Int

from sat_jax.nn.attention.documents import pad_rows

# Tiles are multiples of the 128 lanes of a TPU. The larger ones are those of other training
# libraries; not measured.
_TILES = (512, 256, 128)
_LANES = 128

# Compiled for TPU v5e up to this size; tiles of larger heads exceed the on-chip memory.
_WIDEST_HEAD = 512


def refusal(q_BTKGE: jax.ShapeDtypeStruct, platform: str) -> str | None:
    """Return why the kernel does not support these queries, or None."""
    if platform != "tpu":
        return f"it needs a TPU, this is {platform}"
    if q_BTKGE.dtype not in (jnp.bfloat16, jnp.float32):
        return f"dtype {q_BTKGE.dtype}; accepted: bfloat16, float32"
    if q_BTKGE.shape[-1] > _WIDEST_HEAD:
        return f"head size {q_BTKGE.shape[-1]}; accepted: up to {_WIDEST_HEAD}"
    return None


def attend(
    q_BTKGE: Float[Array, "B T K G E"],
    k_BTKE: Float[Array, "B T K E"],
    v_BTKE: Float[Array, "B T K E"],
    documents: Int[Array, "B T"],
    *,
    interpret: bool = False,
) -> Float[Array, "B T K G E"]:
    """Return causal attention within documents. `interpret` runs the kernel on any platform."""
    batch, length, groups, heads, size = q_BTKGE.shape
    # The kernel does not scale q·k.
    q_BTKGE = (q_BTKGE.astype(jnp.float32) * size**-0.5).astype(q_BTKGE.dtype)
    documents, q, k, v = pad_rows(_LANES, documents, q_BTKGE, k_BTKE, v_BTKE)
    padded = documents.shape[1]
    kernel = splash_kernel.make_splash_mha_single_device(
        splash_mask.MultiHeadMask([splash_mask.CausalMask((padded, padded))] * (groups * heads)),
        block_sizes=_block_sizes(padded),
        interpret=interpret,
    )
    # Query head h uses KV head h // G: heads are group-major.
    o = jax.vmap(kernel)(
        q.reshape(batch, padded, groups * heads, size).swapaxes(1, 2),
        k.swapaxes(1, 2),
        v.swapaxes(1, 2),
        splash_kernel.SegmentIds(documents, documents),
    )
    return o.swapaxes(1, 2).reshape(q.shape)[:, :length]


def _block_sizes(length: int) -> splash_kernel.BlockSizes:
    tile = next(tile for tile in _TILES if length % tile == 0)
    return splash_kernel.BlockSizes(
        block_q=tile,
        block_kv=tile,
        block_q_dkv=tile,
        block_kv_dkv=tile,
        block_q_dq=tile,
        block_kv_dq=tile,
    )
