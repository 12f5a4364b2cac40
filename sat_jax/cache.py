"""Where prepared data and compiled programs live between runs."""

import os
from pathlib import Path

from sat_jax.errors import UserError


def cache_dir(name: str) -> Path:
    """Folder `name` under `$SAT_JAX_CACHE` (default `~/.cache/sat_jax`), made if missing.

    Raises `UserError` where it cannot be.
    """
    root = os.environ.get("SAT_JAX_CACHE") or "~/.cache/sat_jax"
    try:
        path = Path(root).expanduser() / name
        path.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError) as error:  # the latter where there is no home
        why = getattr(error, "strerror", None) or error
        raise UserError(
            f"cache folder {root}: cannot be used: {why}; $SAT_JAX_CACHE names it"
        ) from error
    return path
