"""Where prepared data and compiled programs live between runs."""

import os
from pathlib import Path


def cache_dir(name: str) -> Path:
    """Folder `name` under `$SAT_JAX_CACHE` (default `~/.cache/sat_jax`), made if missing."""
    root = os.environ.get("SAT_JAX_CACHE") or "~/.cache/sat_jax"
    path = Path(root).expanduser() / name
    path.mkdir(parents=True, exist_ok=True)
    return path
