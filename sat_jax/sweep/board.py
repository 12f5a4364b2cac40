"""What a sweep shows while it runs: a table that lives on a terminal, lines elsewhere."""

import sys
import time
from collections.abc import Sequence
from typing import Protocol, Self, TextIO

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text
from tqdm import tqdm

from sat_jax.analysis.tables import duration
from sat_jax.sweep.axes import short_names, shown, told
from sat_jax.sweep.watch import State, Watched
from sat_jax.train.progress import describe

_STYLE = {State.RUNNING: "bold", State.FAILED: "red", State.STOPPED: "yellow"}
_ORDER = list(State)


class Board(Protocol):
    """Shows the runs of a sweep; a context."""

    def __enter__(self) -> Self: ...
    def __exit__(self, *_: object) -> None: ...

    def changed(self, one: Watched) -> None:
        """A run has another state."""

    def refresh(self) -> None:
        """Some time has passed."""

    def say(self, line: str) -> None:
        """A line of its own."""


def make_board(runs: Sequence[Watched], stream: TextIO | None = None, every: float = 30.0) -> Board:
    """On a terminal a table, else a line a change, and one a running run every `every` seconds."""
    stream = stream or sys.stderr
    return _Table(runs, stream) if stream.isatty() else _Lines(runs, stream, every)


class _Lines:
    def __init__(self, runs: Sequence[Watched], stream: TextIO, every: float):
        self._runs, self._stream, self._every = runs, stream, every
        self._short = short_names(path for one in runs for path in one.run.settings)
        self._printed = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def changed(self, one: Watched) -> None:
        ended = sum(o.state in (State.FINISHED, State.FAILED) for o in self._runs)
        state = one.state.value
        if one.state is State.FAILED:
            state = f"failed: {one.error} (log: {one.log})"
        elif one.state is State.FINISHED:
            state = f"finished  {describe(_measured(one))}"
        self.say(f"[{ended}/{len(self._runs)}] {self._name(one)}  {state}")

    def refresh(self) -> None:
        if time.monotonic() - self._printed < self._every:
            return
        for one in self._runs:
            if one.state is State.RUNNING:
                left = "?" if one.seconds_left is None else duration(one.seconds_left)
                self.say(
                    f"{self._name(one)}  step {one.step}/{one.steps}  {describe(one.latest)}"
                    f"  left {left}"
                )
        self._printed = time.monotonic()

    def say(self, line: str) -> None:
        self._stream.write(line + "\n")
        self._stream.flush()

    def _name(self, one: Watched) -> str:
        return f"{one.run.name}  {told(one.run.settings, self._short)}"


class _Table:
    def __init__(self, runs: Sequence[Watched], stream: TextIO):
        self._runs = runs
        self._short = short_names(path for one in runs for path in one.run.settings)
        self._live = Live(
            console=Console(file=stream), get_renderable=self._draw, auto_refresh=False,
            redirect_stdout=False, redirect_stderr=False,
        )  # fmt: skip

    def __enter__(self) -> Self:
        self._live.start(refresh=True)
        return self

    def __exit__(self, *_: object) -> None:
        self.refresh()
        self._live.stop()

    def changed(self, one: Watched) -> None:
        if one.state is State.FAILED:
            self.say(f"{one.run.name} failed: {one.error} (log: {one.log})")

    def refresh(self) -> None:
        self._live.refresh()

    def say(self, line: str) -> None:
        self._live.console.print(Text(line))

    def _draw(self) -> Table:
        """Running first: what does not fit the terminal is cut off at the end."""
        counts = [(s.value, sum(one.state is s for one in self._runs)) for s in State]
        table = Table(
            title=", ".join(f"{count} {name}" for name, count in counts if count),
            box=None, title_justify="left", pad_edge=False,
        )  # fmt: skip
        table.add_column("run", no_wrap=True)
        for name in self._short.values():
            table.add_column(name)
        for name in ("step", "loss", "eval", "tokens/s", "left"):
            table.add_column(name, justify="right", no_wrap=True)
        table.add_column("state", no_wrap=True)
        for one in sorted(self._runs, key=lambda one: _ORDER.index(one.state)):
            known = _measured(one)
            left = one.seconds_left if one.state is State.RUNNING else None
            table.add_row(
                one.run.name,
                *(
                    shown(one.run.settings[path]) if path in one.run.settings else ""
                    for path in self._short
                ),
                f"{one.step}/{one.steps}",
                _number(known.get("loss")),
                _number(known.get("eval_loss")),
                tqdm.format_sizeof(known["tokens_per_second"]) if known else "",
                "" if left is None else duration(left),
                one.state.value,
                style=_STYLE.get(one.state, ""),
            )
        return table


def _measured(one: Watched) -> dict[str, float]:
    """Of the newest records, once there is one of a step."""
    names = ("loss", "eval_loss", "tokens_per_second")
    found = {name: one.latest[name] for name in names if one.latest.get(name) is not None}
    return found if "tokens_per_second" in found else {}


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
