"""Folders for prepared data and compiled programs, shared by all runs."""

import os
from pathlib import Path

from sat_jax.errors import UserError


def cache_dir(name: str) -> Path:
    """Return folder `name` under `$SAT_JAX_CACHE` (default `~/.cache/sat_jax`), created if missing.

    Raises `UserError` if it cannot be created.
    """
    root = os.environ.get("SAT_JAX_CACHE") or "~/.cache/sat_jax"
    try:
        path = Path(root).expanduser() / name
        path.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError) as error:  # RuntimeError: no home directory
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"cache folder {root}: cannot be used: {reason}; set $SAT_JAX_CACHE to another one"
        ) from error
    return path
