"""Progress display: a bar on a terminal, periodic lines elsewhere."""

import sys
import time
from collections.abc import Mapping
from typing import Any, TextIO

from tqdm import tqdm

from sat_jax.results.text import percent

_SMOOTHING = 0.3  # weight of the latest seconds per step, as in tqdm


class Progress:
    """Display of steps, losses, kept shares, tokens/s and remaining time of a run.

    Without a terminal a line is printed for the first and last record, each new rung and each
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
        self._step_seconds: float | None = None
        self._bar = None
        if self._stream.isatty():
            self._bar = tqdm(
                total=total, initial=start, file=self._stream, unit="step", dynamic_ncols=True
            )

    def update(self, step: int, record: Mapping[str, Any]) -> None:
        """Display that `step` steps are done, with the values of `record`."""
        now = time.monotonic()
        rung, evaluated = record.get("rung"), record.get("eval_loss") is not None
        if self._updated is not None and step > self._step:
            seconds = (now - self._updated) / (step - self._step)
            mean = self._step_seconds
            self._step_seconds = seconds if mean is None else mean + _SMOOTHING * (seconds - mean)
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
        """Print a line, above the bar if there is one."""
        if self._bar is not None:
            self._bar.write(text, file=self._stream)
        else:
            self._line(text)

    def close(self) -> None:
        """Close the bar without clearing it."""
        if self._bar is not None:
            self._bar.close()

    def _line(self, text: str) -> None:
        self._stream.write(text + "\n")
        self._stream.flush()

    def _left(self) -> str:
        if self._step >= self._total:
            return "00:00"
        if self._step_seconds is None:
            return "?"
        return str(tqdm.format_interval(self._step_seconds * (self._total - self._step)))


def describe(record: Mapping[str, Any]) -> str:
    """Return the values of `record` as text, with kept shares of heads and channels, or of blocks:
    "loss 3.2145  eval 3.4567  heads 69 % channels 63 %  1.23k tok/s"."""
    parts: list[str] = []
    for name, key in (("loss", "loss"), ("eval", "eval_loss")):
        if record.get(key) is not None:
            parts.append(f"{name} {record[key]:.4f}")
    if record.get("stored_blocks", 1) < 1:
        parts.append(f"blocks {percent(record['stored_blocks'])}")
    elif record.get("kept_heads") is not None:
        heads, channels = percent(record["kept_heads"]), percent(record["kept_channels"])
        parts.append(f"heads {heads} channels {channels}")
    if record.get("dropped_branches"):
        parts.append(f"without backward {percent(record['dropped_branches'])}")
    if record.get("omitted_tokens"):
        parts.append(f"tokens omitted {percent(record['omitted_tokens'])}")
    if record.get("skipped_tokens"):
        parts.append(f"tokens that skip layers {percent(record['skipped_tokens'])}")
    if record.get("tokens_per_second") is not None:
        parts.append(f"{tqdm.format_sizeof(record['tokens_per_second'])} tok/s")
    return "  ".join(parts)
