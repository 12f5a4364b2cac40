"""Runs in several processes: all processes compute, process 0 decides and writes."""

from collections.abc import Callable, Mapping

import jax
import numpy as np
from jax.experimental import multihost_utils

from sat_jax.errors import UserError

_FAILED = -(2**31)


def join() -> None:
    """Initialise jax for several processes that a cluster started. No device may have been used.
    Raises `UserError` if jax finds no cluster."""
    try:
        jax.distributed.initialize()
    except (ValueError, RuntimeError) as error:
        raise UserError(
            "--distributed needs processes started by Slurm, Open MPI, Kubernetes or a TPU pod:"
            f" {error}"
        ) from error


def check_processes() -> None:
    """Raise `UserError` if there are several processes and `join` was not called."""
    if jax.process_count() > 1 and not is_distributed():
        raise UserError(
            f"there are {jax.process_count()} processes without --distributed; accepted:"
            " --distributed for all of them"
        )


def is_distributed() -> bool:
    """Return whether the run has several processes. Starts no backend."""
    return jax.distributed.is_initialized()


def is_primary() -> bool:
    """Return whether this is process 0, the only one that writes files and messages.

    Starts no backend in a run of one process, so that refused runs do not occupy devices.
    """
    return not is_distributed() or jax.process_index() == 0


def on_primary(function: Callable[[], int]) -> int:
    """Call `function` on process 0 only and return its result on all processes.

    If it fails, process 0 raises its error and all others a `UserError`, so that none waits for a
    process that has ended.
    """
    if not is_distributed():
        return function()
    result, failure = _FAILED, None
    if is_primary():
        try:
            result = function()
        except Exception as error:
            failure = error
    result = int(multihost_utils.broadcast_one_to_all(np.int32(result)))
    if failure is not None:
        raise failure
    if result == _FAILED:
        raise UserError("process 0 failed; see its error message")
    return result


def on_host(params: Mapping[str, jax.Array]) -> Callable[[str], np.ndarray]:
    """Return a function that returns a full parameter by path. In several processes all of them
    call this, and each needs host memory for all parameters."""
    if jax.process_count() == 1:
        return lambda path: np.asarray(params[path])
    gathered: dict[str, np.ndarray] = multihost_utils.process_allgather(dict(params), tiled=True)
    return gathered.__getitem__
