"""Where a measured row comes from: versions, device and commit, named as in the rows of
`experiments/results`."""

import importlib.metadata
import importlib.util
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import jax

_ROOT = Path(__file__).resolve().parents[1]
_PACKAGES = ("jax", "jaxlib", "numpy", "torch")


def origin() -> dict[str, Any]:
    """Of this process. Packages that are not installed are left out."""
    there = [name for name in _PACKAGES if importlib.util.find_spec(name)]
    versions = {name: importlib.metadata.version(name) for name in there}
    return {
        "versions": {"python": platform.python_version(), **versions},
        "device": device(),
        "commit": commit(),
    }


def device() -> dict[str, Any]:
    """Whose times they are."""
    first = jax.devices()[0]
    return {
        "platform": first.platform,
        "kind": first.device_kind,
        "count": jax.device_count(),
        "processes": jax.process_count(),
        "host_cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
    }


def commit() -> str | None:
    """Of the clone that this file is in, "-dirty" where files differ from it; None: in none."""
    here = _git("rev-parse", "--show-toplevel", "HEAD")
    if here is None or here.splitlines()[0] != str(_ROOT):
        return None
    return here.splitlines()[1] + ("-dirty" if _git("status", "--porcelain") else "")


def _git(*arguments: str) -> str | None:
    command = ["git", "-C", str(_ROOT), *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
