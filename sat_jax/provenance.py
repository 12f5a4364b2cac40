"""Provenance of a measurement: package versions, device and commit."""

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax

_PACKAGES = ("sat_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
_ROOT = Path(__file__).resolve().parents[1]
# Measurements write here, so that their own output must not change the commit of the next row.
_MEASURED = ("experiments/results", "kernels/block_sparse_matmul/tuning")


def environment() -> dict[str, Any]:
    """Return versions, device and commit, to be stored with every measured row."""
    return {"versions": _versions(), "device": _device(), "commit": _commit()}


def _versions() -> dict[str, str | None]:
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    return versions


def _device() -> dict[str, Any]:
    device = jax.devices()[0]
    kind = device.device_kind
    if device.platform == "cpu":
        kind = _processor() or kind
    return {
        "platform": device.platform,
        "kind": kind,
        "count": jax.device_count(),
        "processes": jax.process_count(),
        "host_cpus": _cores(),
    }


def _cores() -> int | None:
    """Return the number of processor cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count()  # not Linux


def _processor() -> str | None:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        return platform.processor() or None
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else None


def _commit() -> str | None:
    """Return the current commit, with "-dirty" if files other than measured results differ from it.

    `SAT_JAX_COMMIT` in the environment names the commit of a copy without git's folder, which
    otherwise is None.
    """
    if named := os.environ.get("SAT_JAX_COMMIT"):
        return named

    def git(*arguments: str) -> str | None:
        try:
            result = subprocess.run(
                ["git", "-C", str(_ROOT), *arguments], capture_output=True, text=True, timeout=10
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return result.stdout.strip() if result.returncode == 0 else None

    # The package may be installed in an environment inside another repository.
    if git("rev-parse", "--show-toplevel") != str(_ROOT):
        return None
    commit = git("rev-parse", "HEAD")
    unchanged = ["--", ".", *(f":(exclude){path}" for path in _MEASURED)]
    return f"{commit}-dirty" if commit and git("status", "--porcelain", *unchanged) else commit
