"""Cells and tables as data: the text that is shown, and the number and its error behind it."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

from sat_jax.analysis.means import estimate, mean_and_error
from sat_jax.analysis.tables import Align, quantity
from sat_jax.analysis.twins import NOTES as TWIN_NOTES
from sat_jax.report.records import Record

COMMITS, DEVICES = "†", "‡"
NOTES = {
    COMMITS: f"{COMMITS} The runs that this is made of are of several commits.",
    DEVICES: f"{DEVICES} The runs that this is made of are of several devices.",
    **TWIN_NOTES,
}


class Cell(NamedTuple):
    """What is shown; `value` and `error` are the number behind it, if it is one."""

    text: str
    value: float | None = None
    error: float | None = None


@dataclasses.dataclass(frozen=True)
class Table:
    """`name` is of its kind: several groups of runs may have one each."""

    name: str
    title: str
    caption: str
    header: tuple[str, ...]
    align: tuple[Align, ...]
    rows: tuple[tuple[Cell, ...], ...]

    @property
    def texts(self) -> list[list[str]]:
        return [[cell.text for cell in row] for row in self.rows]

    @property
    def notes(self) -> list[str]:
        """What the marks in the cells mean."""
        shown = "".join(cell.text for row in self.rows for cell in row)
        return [text for mark, text in NOTES.items() if mark in shown]


def mean_cell(values: Sequence[float | None], text: str) -> Cell:
    """Mean and standard error of those that are known, by the format `text`."""
    found = estimate(values)
    if found is None:
        return Cell("-")
    return Cell(mean_and_error(values, text), found.mean, found.error)


def plain_cell(values: Sequence[float | None], text: str) -> Cell:
    """The mean without its error, for what hardly differs between seeds; `text` is a format, or a
    unit to be shown with an SI prefix."""
    found = estimate(values)
    if found is None:
        return Cell("-")
    told = text.format(found.mean) if "{" in text else quantity(found.mean, text)
    return Cell(told, found.mean)


def marked(cell: Cell, runs: Sequence[Record]) -> Cell:
    """With a mark where the runs behind a speed are not of one commit or of one device."""
    marks = COMMITS if len({run.commit for run in runs}) > 1 else ""
    marks += DEVICES if len({run.device for run in runs}) > 1 else ""
    return cell._replace(text=cell.text + marks) if cell.value is not None else cell
