"""Documents within rows, for all attention backends: runs of equal segment ids."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def number_documents(segment_ids: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """Return 0, 1, 2, … along each row, one number for each run of equal segment ids.

    Padding is a run too and attends to itself, so that every softmax has a term. Numbers do not
    decrease along a row, as blocked backends require.
    """
    begins = segment_ids[:, 1:] != segment_ids[:, :-1]
    return jnp.cumsum(jnp.pad(begins, ((0, 0), (1, 0))), axis=1, dtype=jnp.int32)


def pad_rows(
    multiple: int, documents: Int[Array, "B T"], *arrays: Float[Array, "B T ..."]
) -> tuple[Array, ...]:
    """Return documents and arrays with rows padded to a multiple of `multiple`, by zeros at the end
    that belong to the last document and are visible to no token before them."""
    padding = -documents.shape[1] % multiple

    def pad(x: Array, mode: str = "constant") -> Array:
        return jnp.pad(x, ((0, 0), (0, padding), *[(0, 0)] * (x.ndim - 2)), mode=mode)

    return pad(documents, "edge"), *map(pad, arrays)
