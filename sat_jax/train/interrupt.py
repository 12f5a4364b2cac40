"""Interruption of a run between two steps by SIGINT or SIGTERM."""

import signal
import threading
from types import FrameType
from typing import Any, Self

from jax.experimental import multihost_utils

from sat_jax.parallel.processes import is_distributed


class Interrupt:
    """Record the first SIGINT or SIGTERM as a request to stop; a second one stops at once.

    The handlers are installed in the main thread of a single process, for signals that are not
    ignored. In several processes a SIGTERM to any of them is a request to all, by the preemption
    service of jax.
    """

    def __init__(self) -> None:
        self._requested = False
        self._handlers: dict[int, Any] = {}

    def requested(self, step: int) -> bool:
        """Return whether to stop after `step`: the same on all processes, which all call this."""
        if is_distributed():
            return bool(multihost_utils.reached_preemption_sync_point(step))
        return self._requested

    def __enter__(self) -> Self:
        if not is_distributed() and threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                if signal.getsignal(number) != signal.SIG_IGN:  # as in the background of a shell
                    self._handlers[number] = signal.signal(number, self._request)
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def _request(self, number: int, frame: FrameType | None) -> None:
        del number, frame
        self._requested = True
        self._restore()

    def _restore(self) -> None:
        while self._handlers:
            signal.signal(*self._handlers.popitem())
