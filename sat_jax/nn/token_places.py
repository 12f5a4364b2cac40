"""Tokens at places of their row: int32 `[B, k]`, ascending and unique."""

import jax

_PROMISES = {
    "indices_are_sorted": True,
    "unique_indices": True,
    "mode": "promise_in_bounds",
}
take_tokens = jax.vmap(lambda row, places: row.at[places].get(**_PROMISES))
"""`take_tokens(x, places)` returns the entries `[B, k, ...]` of an array `[B, T, ...]`."""
put_tokens = jax.vmap(lambda row, places, new: row.at[places].set(new, **_PROMISES))
"""`put_tokens(x, places, new)` returns the array with these entries replaced by `new`."""
