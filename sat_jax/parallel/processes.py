"""One run in several processes: process 0 decides and writes, all of them compute."""

from collections.abc import Callable, Mapping

import jax
import numpy as np
from jax.experimental import multihost_utils

from sat_jax.errors import UserError

_GAVE_UP = -(2**31)


def join() -> None:
    """Makes this process one of several, as the cluster that started them says. Before anything
    else: no device may have been used. Raises `UserError` where there is no cluster to ask."""
    try:
        jax.distributed.initialize()
    except (ValueError, RuntimeError) as error:
        raise UserError(
            "--distributed needs processes that Slurm, Open MPI, Kubernetes or a TPU pod started"
            f" together: {error}"
        ) from error


def check_joined() -> None:
    """Raises `UserError` where devices belong to several processes that never joined."""
    if jax.process_count() > 1 and not together():
        raise UserError(
            f"this is one of {jax.process_count()} processes; accepted: all of them with"
            " --distributed"
        )


def together() -> bool:
    """Whether this process is one of several of a run. Starts no backend."""
    return jax.distributed.is_initialized()


def is_primary() -> bool:
    """Whether this is process 0, the only one that writes files and talks to people.

    Starts no backend in a run of one process: a run that is refused should not take the devices.
    """
    return not together() or jax.process_index() == 0


def decide(judge: Callable[[], int]) -> int:
    """What `judge` gives on process 0, on every process; it is called there alone.

    Where it fails, process 0 raises its error and the others a `UserError`, so that none of them
    waits for one that has ended.
    """
    if not together():
        return judge()
    verdict, failure = _GAVE_UP, None
    if is_primary():
        try:
            verdict = judge()
        except Exception as error:
            failure = error
    verdict = int(multihost_utils.broadcast_one_to_all(np.int32(verdict)))
    if failure is not None:
        raise failure
    if verdict == _GAVE_UP:
        raise UserError("process 0 gave up; it says why")
    return verdict


def on_host(params: Mapping[str, jax.Array]) -> Callable[[str], np.ndarray]:
    """A reader of whole parameters. Where processes hold parts of them, all processes have to call
    this together, and each needs host memory for all parameters."""
    if jax.process_count() == 1:
        return lambda path: np.asarray(params[path])
    gathered: dict[str, np.ndarray] = multihost_utils.process_allgather(dict(params), tiled=True)
    return gathered.__getitem__
