"""Documents within rows, as every attention backend sees them: runs of equal segment ids."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def number_documents(segment_ids: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """0, 1, 2, … along each row, one number for each run of equal segment ids.

    Padding is a run like any other: its rows see themselves and nothing else, so that every softmax
    has a term. Numbers never fall along a row, which block-wise backends rely on.
    """
    begins = segment_ids[:, 1:] != segment_ids[:, :-1]
    return jnp.cumsum(jnp.pad(begins, ((0, 0), (1, 0))), axis=1, dtype=jnp.int32)


def pad_rows(
    multiple: int,
    q_BTKGE: Float[Array, "B T K G E"],
    k_BTKE: Float[Array, "B T K E"],
    v_BTKE: Float[Array, "B T K E"],
    documents: Int[Array, "B T"],
) -> tuple[
    Float[Array, "B T2 K G E"],
    Float[Array, "B T2 K E"],
    Float[Array, "B T2 K E"],
    Int[Array, "B T2"],
]:
    """Rows made longer up to a multiple of `multiple`, by zeros that belong to the last document.

    They come after everything, so that no token of the row sees them.
    """
    more = -documents.shape[1] % multiple

    def pad(x: Array, mode: str = "constant") -> Array:
        return jnp.pad(x, ((0, 0), (0, more), *[(0, 0)] * (x.ndim - 2)), mode=mode)

    return pad(q_BTKGE), pad(k_BTKE), pad(v_BTKE), pad(documents, "edge")
