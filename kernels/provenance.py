"""Provenance of a measured row: package versions, device and commit.

The fields are named as in the rows of `experiments/results`.
"""

import importlib.metadata
import importlib.util
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import jax

_ROOT = Path(__file__).resolve().parents[1]
# Measurements write here, so that their own output must not change the commit of the next row.
_MEASURED = ("experiments/results", "kernels/block_sparse_matmul/tuning")
_PACKAGES = ("jax", "jaxlib", "numpy", "torch")


def provenance() -> dict[str, Any]:
    """Return the provenance of rows of this process, without packages that are not installed."""
    installed = [name for name in _PACKAGES if importlib.util.find_spec(name)]
    versions = {name: importlib.metadata.version(name) for name in installed}
    device = jax.devices()[0]
    return {
        "versions": {"python": platform.python_version(), **versions},
        "device": {
            "platform": device.platform,
            "kind": device.device_kind,
            "count": jax.device_count(),
            "processes": jax.process_count(),
            "host_cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        },
        "commit": commit(),
    }


def commit() -> str | None:
    """Return the commit of this clone, with "-dirty" if files other than measured results differ.

    `SAT_JAX_COMMIT` in the environment names the commit of a copy without git's folder, which
    otherwise is None.
    """
    if named := os.environ.get("SAT_JAX_COMMIT"):
        return named
    lines = _git("rev-parse", "--show-toplevel", "HEAD")
    if lines is None or lines.splitlines()[0] != str(_ROOT):
        return None
    unchanged = ["--", ".", *(f":(exclude){path}" for path in _MEASURED)]
    return lines.splitlines()[1] + ("-dirty" if _git("status", "--porcelain", *unchanged) else "")


def _git(*arguments: str) -> str | None:
    command = ["git", "-C", str(_ROOT), *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
