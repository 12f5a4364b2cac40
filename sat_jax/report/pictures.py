"""Pictures in documents, made from committed rows."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from sat_jax.analysis.rows import read
from sat_jax.errors import UserError
from sat_jax.report.figures import flops_figure
from sat_jax.report.groups import make_groups
from sat_jax.report.records import newest, record_of
from sat_jax.report.size_figures import memory_figure, speed_figure
from sat_jax.report.sizes import Row

_WIDTH = 9.0  # inches
_ROWS = "Rows"  # the note inside a picture that says of which rows it is


def pictures(results: Path, folder: Path) -> list[Path]:
    """Writes a picture into `folder` for each file of `results` that has one; those written."""
    made = []
    for name, draw in _DRAWN.items():
        file = results / f"{name}.jsonl"
        if file.exists():
            folder.mkdir(parents=True, exist_ok=True)
            made.append(folder / f"{name}.png")
            note = {"Software": None, _ROWS: _digest(file)}
            draw(read(file)).savefig(made[-1], format="png", metadata=note)
    return made


def outdated_pictures(results: Path, folder: Path) -> list[Path]:
    """The pictures that are missing, or not of the rows that are there. Rows are compared and no
    pixels, which depend on the versions of matplotlib and its fonts."""
    there = [name for name in _DRAWN if (results / f"{name}.jsonl").exists()]
    return [
        folder / f"{name}.png"
        for name in there
        if not _is_of(folder / f"{name}.png", results / f"{name}.jsonl")
    ]


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()[:16]


def _is_of(picture: Path, file: Path) -> bool:
    # A PNG's tEXt chunk: keyword, a zero, the text as it is.
    note = f"{_ROWS}\0{_digest(file)}".encode()
    return picture.exists() and note in picture.read_bytes()


def _study_figure(rows: Sequence[Row]) -> Figure:
    """Of the runs that most others can be held against. Raises `UserError` where there are none."""
    groups = make_groups(newest(record_of(row, None, "study") for row in rows))
    most = max(groups, key=lambda group: len(group.all_runs), default=None)
    figure = None if most is None else flops_figure(most, _WIDTH)
    if figure is None:
        raise UserError("study.jsonl: no sparse run with a dense one of its seed")
    return figure


_DRAWN = {"memory": memory_figure, "efficiency": speed_figure, "study": _study_figure}
