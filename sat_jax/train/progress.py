"""Progress that is always visible: a bar on a terminal, a line every so often elsewhere."""

import sys
import time
from collections.abc import Mapping
from typing import Any, TextIO

from tqdm import tqdm

from sat_jax.results.text import percent

_SMOOTHING = 0.3  # of the seconds a step; tqdm's own default


class Progress:
    """Shows steps done, losses, what is kept, tokens/s and time left of a run of `total` steps.

    Without a terminal it prints a line for the first record, the last one, each new rung, each
    evaluation, and otherwise every `every` seconds.
    """

    def __init__(
        self, total: int, start: int = 0, stream: TextIO | None = None, every: float = 10.0
    ) -> None:
        self._total = total
        self._step = start
        self._stream = stream or sys.stderr
        self._every = every
        self._updated: float | None = None
        self._printed = -float("inf")
        self._rung: Any = None
        self._seconds_a_step: float | None = None
        self._bar = None
        if self._stream.isatty():
            self._bar = tqdm(
                total=total, initial=start, file=self._stream, unit="step", dynamic_ncols=True
            )

    def update(self, step: int, record: Mapping[str, Any]) -> None:
        """Shows that `step` steps are done, with what it knows in `record`."""
        now = time.monotonic()
        rung, evaluated = record.get("rung"), record.get("eval_loss") is not None
        if self._updated is not None and step > self._step:
            seconds = (now - self._updated) / (step - self._step)
            old = self._seconds_a_step
            self._seconds_a_step = seconds if old is None else old + _SMOOTHING * (seconds - old)
        done, self._step, self._updated = step - self._step, step, now
        if self._bar is not None:
            self._bar.set_postfix_str(describe(record), refresh=False)
            self._bar.update(done)
            if evaluated:
                self.note(f"step {step}/{self._total}  {describe(record)}")
            return
        due = evaluated or now - self._printed >= self._every
        if due or rung != self._rung or step >= self._total:
            self._printed, self._rung = now, rung
            self._line(f"step {step}/{self._total}  {describe(record)}  left {self._left()}")

    def note(self, text: str) -> None:
        """Prints a line of its own, above the bar."""
        if self._bar is not None:
            self._bar.write(text, file=self._stream)
        else:
            self._line(text)

    def close(self) -> None:
        """Leaves the bar as it stands."""
        if self._bar is not None:
            self._bar.close()

    def _line(self, text: str) -> None:
        self._stream.write(text + "\n")
        self._stream.flush()

    def _left(self) -> str:
        if self._step >= self._total:
            return "00:00"
        if self._seconds_a_step is None:
            return "?"
        return str(tqdm.format_interval(self._seconds_a_step * (self._total - self._step)))


def describe(record: Mapping[str, Any]) -> str:
    """ "loss 3.2145  eval 3.4567  heads 69 % channels 63 %  1.23k tok/s", of what `record` holds:
    the shares are what is kept."""
    parts: list[str] = []
    for name, key in (("loss", "loss"), ("eval", "eval_loss")):
        if record.get(key) is not None:
            parts.append(f"{name} {record[key]:.4f}")
    if record.get("kept_heads") is not None:
        heads, channels = percent(record["kept_heads"]), percent(record["kept_channels"])
        parts.append(f"heads {heads} channels {channels}")
    if record.get("tokens_per_second") is not None:
        parts.append(f"{tqdm.format_sizeof(record['tokens_per_second'])} tok/s")
    return "  ".join(parts)
