"""Pictures in documents, made from committed rows."""

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


def pictures(results: Path, folder: Path) -> list[Path]:
    """Writes a picture into `folder` for each file of `results` that has one; those written."""
    made = []
    drawn = {"memory": memory_figure, "efficiency": speed_figure, "study": _study_figure}
    for name, draw in drawn.items():
        file = results / f"{name}.jsonl"
        if file.exists():
            folder.mkdir(parents=True, exist_ok=True)
            made.append(folder / f"{name}.png")
            draw(read(file)).savefig(made[-1], format="png", metadata={"Software": None})
    return made


def _study_figure(rows: Sequence[Row]) -> Figure:
    """Of the runs that most others can be held against. Raises `UserError` where there are none."""
    groups = make_groups(newest(record_of(row, None, "study") for row in rows))
    most = max(groups, key=lambda group: len(group.all_runs), default=None)
    figure = None if most is None else flops_figure(most, _WIDTH)
    if figure is None:
        raise UserError("study.jsonl: no sparse run with a dense one of its seed")
    return figure
