"""Stopping a run between two steps: Ctrl-C, or the SIGTERM that clusters send ahead of a kill."""

import signal
import threading
from types import FrameType
from typing import Any, Self

from jax.experimental import multihost_utils

from sat_jax.parallel.processes import together


class Interrupt:
    """While this is open, the first SIGINT or SIGTERM only asks; a second one stops at once.

    Of one process in its main thread, and of signals that are not ignored: elsewhere they do what
    they always do. Of several processes, a SIGTERM to any of them asks all, by jax's own preemption
    service.
    """

    def __init__(self) -> None:
        self._asked = False
        self._before: dict[int, Any] = {}

    def asked(self, step: int) -> bool:
        """Whether to stop after `step`; all processes ask for the same steps, and hear the same."""
        if together():
            return bool(multihost_utils.reached_preemption_sync_point(step))
        return self._asked

    def __enter__(self) -> Self:
        if not together() and threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                if signal.getsignal(number) != signal.SIG_IGN:  # as in the background of a shell
                    self._before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def _ask(self, number: int, frame: FrameType | None) -> None:
        del number, frame
        self._asked = True
        self._restore()

    def _restore(self) -> None:
        while self._before:
            signal.signal(*self._before.popitem())
