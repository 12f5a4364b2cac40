"""Attention on NVIDIA GPUs by cuDNN's fused kernels.

Documents are passed as segment offsets if the device supports them. Otherwise, or if a row has more
than `MAX_DOCUMENTS`, they are passed as a bias `[B, 1, T, T]` in the compute dtype, for one layer
at a time (2·B·T² bytes in bfloat16). Both are exact.

The public function of jax has no offsets, so that this module uses a private one.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax._src.cudnn import fused_attention_stablehlo as fused
from jaxtyping import Array, Float, Int

from sat_jax.nn.attention.documents import pad_rows

# Older versions read grouped heads at wrong offsets, without an error (jax pull request 39521), and
# compute the gradient of a boolean mask (39512).
_FIRST_JAX = (0, 11, 2)
# For segment offsets: cuDNN 9.6 on Hopper or newer.
_OFFSETS_CUDNN, _OFFSETS_CAPABILITY = 90_600, (9, 0)
# The saved statistics of the kernel are float32 [B · MAX_DOCUMENTS, K · G, T].
MAX_DOCUMENTS = 32


class Device(NamedTuple):
    """cuDNN's version (9.6.0 is 90600) and the compute capability of the GPU."""

    cudnn: int
    capability: tuple[int, ...]


def device() -> Device | None:
    """Return the first GPU, or None without an NVIDIA GPU or cuDNN."""
    if jax.default_backend() != "gpu":
        return None
    try:
        version = fused.check_cudnn_version()
    except RuntimeError:
        return None
    capability = jax.local_devices(backend="gpu")[0].compute_capability
    return Device(version, tuple(int(part) for part in capability.split(".")))


def refusal(q_BTKGE: jax.ShapeDtypeStruct, platform: str) -> str | None:
    """Return why the kernels do not support these queries, or None."""
    gpu = device()
    if platform != "gpu" or gpu is None:
        return f"it needs an NVIDIA GPU with cuDNN, this is {platform}"
    if jax.__version_info__ < _FIRST_JAX:
        first = ".".join(map(str, _FIRST_JAX))
        return f"it needs jax {first} or newer, this is {jax.__version__}"
    if q_BTKGE.dtype not in (jnp.bfloat16, jnp.float16):
        return f"dtype {q_BTKGE.dtype}; accepted: bfloat16, float16"
    size, widest = q_BTKGE.shape[-1], 256 if gpu.capability >= (9, 0) else 128
    if size > widest or size % 8:
        return f"head size {size}; accepted: multiples of 8 up to {widest}"
    return None


def attend(
    q_BTKGE: Float[Array, "B T K G E"],
    k_BTKE: Float[Array, "B T K E"],
    v_BTKE: Float[Array, "B T K E"],
    documents: Int[Array, "B T"],
) -> Float[Array, "B T K G E"]:
    """Return causal attention within documents, as numbered by `number_documents`."""
    length = documents.shape[1]
    # The backward pass with a bias needs an even number of tokens.
    documents, q, k, v = pad_rows(2, documents, q_BTKGE, k_BTKE, v_BTKE)
    # Query head h uses KV head h // G: heads are group-major.
    operands = q.reshape(*q.shape[:2], -1, q.shape[-1]), k, v, documents
    gpu = device()
    if gpu and gpu.cudnn >= _OFFSETS_CUDNN and gpu.capability >= _OFFSETS_CAPABILITY:
        few = jnp.max(documents) < MAX_DOCUMENTS
        o = jax.lax.cond(few, _attend_by_offsets, _attend_by_bias, *operands)
    else:
        o = _attend_by_bias(*operands)
    return o.reshape(q.shape)[:, :length]


def _is_kernel(primitive: Any, *_: Any, **__: Any) -> bool:
    return bool(primitive.name == "dot_product_attention_fwd_wrapper")


# Only outputs of the kernels are saved for the backward pass. Bias and offsets are recomputed, as
# both branches of `lax.cond` would have to save them.
_saves_kernel = functools.partial(jax.checkpoint, policy=_is_kernel)


@_saves_kernel
def _attend_by_offsets(
    q_BTHE: Float[Array, "B T H E"],
    k_BTKE: Float[Array, "B T K E"],
    v_BTKE: Float[Array, "B T K E"],
    documents: Int[Array, "B T"],
) -> Float[Array, "B T H E"]:
    lengths, offsets = _segments(documents)
    return fused.dot_product_attention(
        q_BTHE,
        k_BTKE,
        v_BTKE,
        q_seqlen=lengths,
        kv_seqlen=lengths,
        q_offsets=offsets,
        kv_offsets=offsets,
        scale=q_BTHE.shape[-1] ** -0.5,
        mask_type=fused.MaskType.PADDING_CAUSAL,
    )


@_saves_kernel
def _attend_by_bias(
    q_BTHE: Float[Array, "B T H E"],
    k_BTKE: Float[Array, "B T K E"],
    v_BTKE: Float[Array, "B T K E"],
    documents: Int[Array, "B T"],
) -> Float[Array, "B T H E"]:
    same = documents[:, :, None] == documents[:, None, :]
    return jax.nn.dot_product_attention(
        q_BTHE, k_BTKE, v_BTKE, mask=same[:, None], is_causal=True, implementation="cudnn"
    )


def _segments(documents: Int[Array, "B T"]) -> tuple[Int[Array, "B M"], Int[Array, "B M1"]]:
    """Return lengths and offsets of the documents of each row, -1 after the last document."""
    before = documents[:, :, None] < jnp.arange(MAX_DOCUMENTS + 1)[None, None, :]
    begins = jnp.sum(before, axis=1, dtype=jnp.int32)
    lengths = jnp.diff(begins, axis=1)
    exists = lengths > 0
    offsets = jnp.where(exists, begins[:, :-1], -1)
    ends = jnp.full_like(offsets[:, :1], -1)
    return jnp.where(exists, lengths, -1), jnp.concatenate([offsets, ends], axis=1)
