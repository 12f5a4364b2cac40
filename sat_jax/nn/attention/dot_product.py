"""Causal attention within documents, with one backend per platform."""

import functools
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from sat_jax.errors import UserError
from sat_jax.nn.attention import cudnn, splash, xla
from sat_jax.nn.attention.documents import number_documents
from sat_jax.nn.mesh_axes import CONTEXT, GROUP_AXES, ROW_AXES, parts

Implementation = Literal["xla", "splash", "cudnn"]
Attend = Callable[..., Array]


class _Backend(NamedTuple):
    """`attend(q, k, v, documents)`, and `refusal(q, platform)`: why the backend does not support
    queries of this shape and dtype, or None. Without `refusal` it supports all. `takes_start`:
    `attend` has an argument `start`, for queries that are a part of the row of their keys."""

    attend: Attend
    refusal: Callable[[jax.ShapeDtypeStruct, str], str | None] | None = None
    takes_start: bool = False


# In order of preference.
_BACKENDS: dict[Implementation, _Backend] = {
    "splash": _Backend(splash.attend, splash.refusal),
    "cudnn": _Backend(cudnn.attend, cudnn.refusal),
    "xla": _Backend(xla.attend, takes_start=True),
}


def dot_product_attention(
    q_BTKGE: Float[Array, "B T K G E"],
    k_BTKE: Float[Array, "B T K E"],
    v_BTKE: Float[Array, "B T K E"],
    segment_ids: Int[Array, "B T"],
    *,
    implementation: Implementation | None = None,
) -> Float[Array, "B T K G E"]:
    """Return softmax(q·k / √E) v over the tokens of the same document up to the query. Softmax is
    computed in float32.

    A document is a run of equal `segment_ids`; padding is treated as a document. Gradients between
    different documents are exactly zero.

    `implementation` None selects the fastest backend of the platform that supports the arrays; a
    named one that does not raises `UserError`. Under a mesh (`jax.set_mesh`) every device computes
    its rows and KV groups without communication. Where the axis `context` splits the tokens of a
    row, every device computes its own queries, and gathers the keys and values of the row.
    """
    reasons = refusals(q_BTKGE, parts(CONTEXT))
    name = implementation or next(name for name, reason in reasons.items() if reason is None)
    if name not in reasons:
        raise UserError(f"attention implementation {name!r}; accepted: {', '.join(reasons)}")
    if reason := reasons[name]:
        raise UserError(f"attention implementation {name!r}: {reason}")
    documents = number_documents(segment_ids)
    return _on_each_device(_BACKENDS[name].attend, q_BTKGE, k_BTKE, v_BTKE, documents)


def refusals(
    q_BTKGE: Float[Any, "B T K G E"], context: int = 1
) -> dict[Implementation, str | None]:
    """Return for each backend why it does not support these queries (arrays or shapes), or None.
    `context`: number of devices that split the tokens of a row."""
    q, platform = jax.ShapeDtypeStruct(q_BTKGE.shape, q_BTKGE.dtype), _platform()

    def refusal(backend: _Backend) -> str | None:
        if reason := backend.refusal and backend.refusal(q, platform):
            return reason
        if context > 1 and not backend.takes_start:
            return f"it needs all queries of a row on one device, and mesh.context is {context}"
        return None

    return {name: refusal(backend) for name, backend in _BACKENDS.items()}


def _platform() -> str:
    """Return the platform of the computation that is traced.

    `jax.lax.platform_dependent` would trace all backends and save the residuals of all of them.
    """
    device = jax.config.jax_default_device  # type: ignore[attr-defined]
    return jax.default_backend() if device is None else getattr(device, "platform", device)


def _on_each_device(
    attend: Attend,
    q_BTKGE: Float[Array, "B T K G E"],
    k_BTKE: Float[Array, "B T K E"],
    v_BTKE: Float[Array, "B T K E"],
    documents: Int[Array, "B T"],
) -> Float[Array, "B T K G E"]:
    """Return `attend` of each device's rows, groups and queries, as the compiler cannot partition
    kernels.

    Rows, groups or queries that the mesh does not split evenly are replicated.
    """
    mesh = jax.sharding.get_abstract_mesh()
    axes = zip(mesh.axis_names, mesh.axis_sizes, mesh.axis_types, strict=True)
    sizes = {name: size for name, size, kind in axes if kind != AxisType.Manual}
    if math.prod(sizes.values()) == 1:
        return attend(q_BTKGE, k_BTKE, v_BTKE, documents)

    def split(count: int, names: tuple[str, ...]) -> tuple[str, ...] | None:
        names = tuple(name for name in names if name in sizes)
        return None if count % math.prod(sizes[name] for name in names) else names

    rows, tokens = split(q_BTKGE.shape[0], ROW_AXES), split(q_BTKGE.shape[1], (CONTEXT,))
    heads = P(rows, tokens, split(q_BTKGE.shape[2], GROUP_AXES))
    if tokens and sizes[CONTEXT] > 1:
        attend = functools.partial(_attend_to_row, attend)
    return jax.shard_map(
        attend,
        in_specs=(heads, heads, heads, P(rows)),
        out_specs=heads,
        axis_names=set(sizes),
        # Loop carries of the backends start replicated and end varying over devices.
        check_vma=False,
    )(q_BTKGE, k_BTKE, v_BTKE, documents)


def _attend_to_row(
    attend: Attend,
    q_BTKGE: Float[Array, "B T K G E"],
    k_BTKE: Float[Array, "B T K E"],
    v_BTKE: Float[Array, "B T K E"],
    documents: Int[Array, "B S"],
) -> Float[Array, "B T K G E"]:
    """Return `attend` of a device's queries to the keys of all devices.

    Gradients of keys and values are summed over devices, and each receives those of its own part.
    """
    k_BSKE, v_BSKE = (jax.lax.all_gather(x, CONTEXT, axis=1, tiled=True) for x in (k_BTKE, v_BTKE))
    start = jax.lax.axis_index(CONTEXT) * q_BTKGE.shape[1]
    return attend(q_BTKGE, k_BSKE, v_BSKE, documents, start)


def attend_chunk(
    start: int | Int[Array, ""],
    q_BCKGE: Float[Array, "B C K G E"],
    k_BSKE: Float[Array, "B S K E"],
    v_BSKE: Float[Array, "B S K E"],
    query_segments: Int[Array, "B C"],
    key_segments: Int[Array, "B S"],
) -> Float[Array, "B C K G E"]:
    """Return attention of queries at positions `start, start + 1, …` to keys at `0, 1, …, S - 1`.

    Tokens with equal segment numbers attend to each other, adjacent or not.
    """
    rows = start + jnp.arange(q_BCKGE.shape[1])
    earlier = rows[:, None] >= jnp.arange(k_BSKE.shape[1])[None, :]
    same = query_segments[:, :, None] == key_segments[:, None, :]
    visible = (earlier[None] & same)[:, None, None]
    scores = jnp.einsum("BCKGE,BSKE->BKGCS", q_BCKGE, k_BSKE, preferred_element_type=jnp.float32)
    scores = jnp.where(visible, scores * q_BCKGE.shape[-1] ** -0.5, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1).astype(v_BSKE.dtype)
    return jnp.einsum("BKGCS,BSKE->BCKGE", weights, v_BSKE)
